// Log lines, which are the process', and events, which are an agent's: of several agents one has a logger.
#include "abuse.h"

#include <stddef.h>
#include <time.h>

enum { PATIENCE_S = 60, LINES_MADE_MAX = 5000 };

static void rest_a_moment(void) {
	const struct timespec moment = {0, 1000000};
	nanosleep(&moment, NULL);
}

static void count_line(void *context, int32_t level, const char *message) {
	HOLDS(level >= P2P_SYNC_LEVEL_ERROR && level <= P2P_SYNC_LEVEL_DEBUG && message[0] != '\0');
	++*(size_t *)context;
}

static void note_link_down(void *context, const p2p_sync_event *event) {
	*(int *)context |= event->kind == P2P_SYNC_EVENT_LINK_DOWN;
}

// Lines wait that the agent with the logger does not take: they are in nobody's way.
static void who_has_no_logger_is_told_its_events(void) {
	size_t lines = 0;
	const p2p_sync_agent logs = started_logging_agent(1, count_line, &lines);
	const p2p_sync_agent processes = started_agent(2), takes = started_agent(3);
	int is_told = 0, is_taken = 0;
	for (const time_t begun = time(NULL); !(is_told && is_taken) && time(NULL) - begun < PATIENCE_S; rest_a_moment()) {
		GIVES(P2P_SYNC_OK, p2p_sync_process(processes, 0, note_link_down, &is_told, NULL));
		p2p_sync_event event;
		memset(&event, 0, sizeof(event));
		event.struct_size = sizeof(event);
		char buffer[4096];
		GIVES(P2P_SYNC_OK, p2p_sync_next_event(takes, &event, buffer, sizeof(buffer), NULL));
		note_link_down(&is_taken, &event);
	}
	HOLDS(is_told && is_taken);
	// That nobody answers was logged as well, by each of them.
	GIVES(P2P_SYNC_OK, p2p_sync_process(logs, 0, NULL, NULL, NULL));
	HOLDS(lines >= 2);
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(processes, 0));
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(takes, 0));
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(logs, 0));
}

typedef struct {
	int is_making;
	size_t lines;
} maker;

// Makes a line by being told one.
static void make_line(void *context, int32_t level, const char *message) {
	maker *self = context;
	(void)level;
	(void)message;
	if (++self->lines < LINES_MADE_MAX && self->is_making) {
		// Warns of the file, and is then refused, for the outbox is in use.
		GIVES(P2P_SYNC_ERR_DATA_DIRECTORY_IN_USE, start_warned_agent(1));
	}
}

static void who_makes_lines_by_being_told_of_them_is_let_go(void) {
	maker made = {0, 0};
	const p2p_sync_agent agent = started_logging_agent(1, make_line, &made);
	made.is_making = 1;
	GIVES(P2P_SYNC_ERR_DATA_DIRECTORY_IN_USE, start_warned_agent(1));
	const size_t before = made.lines;
	GIVES(P2P_SYNC_OK, p2p_sync_process(agent, 0, NULL, NULL, NULL));
	const size_t once = made.lines;
	GIVES(P2P_SYNC_OK, p2p_sync_process(agent, 0, NULL, NULL, NULL));
	HOLDS(before < once && once < made.lines && made.lines < LINES_MADE_MAX);
	made.is_making = 0;
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(agent, 0));
}

void lines(void) {
	who_has_no_logger_is_told_its_events();
	who_makes_lines_by_being_told_of_them_is_let_go();
}
