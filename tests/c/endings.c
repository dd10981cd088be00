// Starts, ends and forks of agents under load: from other threads, several at once, while they are called.
#include "abuse.h"

#include <dirent.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { AGENTS_MAX = 8, CALLERS = 8, CALLS_BEFORE_THE_END = 200, ENDED_UNDER_LOAD = 5, DESCRIPTORS_MAX = 64 };
// What was taken is written to disk first, which takes its time where each instruction is looked at.
enum { PATIENCE_MS = 60000 };

static void *start_in_a_thread(void *agent) {
	*(p2p_sync_agent *)agent = started_agent(1);
	return NULL;
}

static void what_one_thread_starts_another_uses_and_ends(void) {
	pthread_t thread;
	p2p_sync_agent agent = 0;
	HOLDS(pthread_create(&thread, NULL, start_in_a_thread, &agent) == 0);
	pthread_join(thread, NULL);
	every_call_gives(P2P_SYNC_OK, agent);
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(agent, PATIENCE_MS));
}

static void eight_agents_run_at_once_and_a_ninth_is_refused(void) {
	p2p_sync_agent agents[AGENTS_MAX], ninth = 77;
	for (int i = 0; i < AGENTS_MAX; ++i) {
		agents[i] = started_agent(i + 1);
	}
	GIVES(P2P_SYNC_ERR_TOO_MANY_AGENTS, start_agent(AGENTS_MAX + 1, &ninth));
	HOLDS(ninth == 77);
	for (int i = 0; i < AGENTS_MAX; ++i) {
		every_call_gives(P2P_SYNC_OK, agents[i]);
	}
	// Room for one again; the handle of the one that made it names nothing else.
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(agents[3], PATIENCE_MS));
	ninth = started_agent(AGENTS_MAX + 1);
	HOLDS(ninth != agents[3]);
	every_call_gives(P2P_SYNC_ERR_SHUT_DOWN, agents[3]);
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(agents[3], PATIENCE_MS));
	every_call_gives(P2P_SYNC_OK, ninth);
	agents[3] = ninth;
	for (int i = 0; i < AGENTS_MAX; ++i) {
		GIVES(P2P_SYNC_OK, p2p_sync_shutdown(agents[i], PATIENCE_MS));
	}
}

// What calls may answer while the agent is shut down on another thread.
static int is_fine_at_the_end(p2p_sync_code code) {
	return code == P2P_SYNC_OK || code == P2P_SYNC_ERR_SHUT_DOWN || code == P2P_SYNC_ERR_QUEUE_FULL
		|| code == P2P_SYNC_ERR_HUB_UNAVAILABLE || code == P2P_SYNC_ERR_NOT_FOUND;
}

typedef struct {
	p2p_sync_agent agent;
	int number;
	// Calls made, read by who shuts down.
	_Atomic unsigned long calls;
} caller;

static void *call_until_it_is_shut_down(void *given) {
	caller *self = given;
	const p2p_sync_operation operation = chat_operation();
	p2p_sync_id id;
	memset(&id, 0, sizeof(id));
	p2p_sync_result result = empty_result();
	char buffer[4096];
	p2p_sync_code code = P2P_SYNC_OK;
	for (unsigned long round = 0; code != P2P_SYNC_ERR_SHUT_DOWN; ++round) {
		switch ((round + (unsigned long)self->number) % 10) {
		case 0:
			code = p2p_sync_submit_critical(self->agent, &operation, &id, &result);
			break;
		case 1:
			code = p2p_sync_process(self->agent, 0, NULL, NULL, NULL);
			break;
		case 2:
			code = p2p_sync_get_status_json(self->agent, buffer, sizeof(buffer), NULL);
			break;
		case 3:
			code = p2p_sync_cache_set(self->agent, text_of("key"), text_of("value"), 0);
			break;
		case 4:
			code = p2p_sync_cache_get(self->agent, text_of("key"), 1, buffer, sizeof(buffer), NULL);
			break;
		case 5:
			code = p2p_sync_get_result(self->agent, &id, &result);
			break;
		case 6:
			code = p2p_sync_publish(self->agent, text_of("channel"), text_of("message"));
			break;
		default:
			code = p2p_sync_submit(self->agent, &operation, &id);
		}
		HOLDS(is_fine_at_the_end(code));
		++self->calls;
	}
	return NULL;
}

// Waits for what never settles while nobody answers, without a bound: the end of the agent lets it go.
static void *wait_until_it_is_shut_down(void *given) {
	caller *self = given;
	const p2p_sync_operation operation = chat_operation();
	p2p_sync_id id;
	p2p_sync_result result = empty_result();
	GIVES(P2P_SYNC_OK, p2p_sync_submit(self->agent, &operation, &id));
	++self->calls;
	const p2p_sync_code code = p2p_sync_wait(self->agent, &id, 0, &result);
	HOLDS(code == P2P_SYNC_ERR_SHUT_DOWN || (code == P2P_SYNC_OK && result.state == P2P_SYNC_UNKNOWN));
	return NULL;
}

static void *shut_down(void *agent) {
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(*(p2p_sync_agent *)agent, PATIENCE_MS));
	return NULL;
}

static void an_agent_ends_while_many_threads_call_it(void) {
	const struct timespec moment = {0, 1000000};
	for (int round = 0; round < ENDED_UNDER_LOAD; ++round) {
		p2p_sync_agent agent = started_agent(1);
		pthread_t threads[CALLERS + 1], ending[2];
		caller callers[CALLERS + 1];
		for (int i = 0; i <= CALLERS; ++i) {
			callers[i] = (caller){.agent = agent, .number = i};
			// The first waits, so that it finds room in the queue.
			HOLDS(pthread_create(&threads[i], NULL,
				i == 0 ? wait_until_it_is_shut_down : call_until_it_is_shut_down, &callers[i]) == 0);
			while (callers[i].calls < (i == 0 ? 1 : CALLS_BEFORE_THE_END)) {
				nanosleep(&moment, NULL);
			}
		}
		// Twice at once: one does it, neither fails.
		for (int i = 0; i < 2; ++i) {
			HOLDS(pthread_create(&ending[i], NULL, shut_down, &agent) == 0);
		}
		for (int i = 0; i < 2; ++i) {
			pthread_join(ending[i], NULL);
		}
		for (int i = 0; i <= CALLERS; ++i) {
			pthread_join(threads[i], NULL);
		}
		every_call_gives(P2P_SYNC_ERR_SHUT_DOWN, agent);
	}
}

// Signal handlers of a map server run game code: none may run on a thread of ours.
static void agent_threads_block_every_signal(void) {
	const p2p_sync_agent agent = started_agent(1);
	DIR *tasks = opendir("/proc/self/task");
	int seen = 0;
	for (struct dirent *task; tasks != NULL && (task = readdir(tasks)) != NULL;) {
		if (task->d_name[0] == '.' || atoi(task->d_name) == (int)getpid()) {
			continue;
		}
		char path[300], line[256];
		snprintf(path, sizeof(path), "/proc/self/task/%s/status", task->d_name);
		FILE *status = fopen(path, "r");
		unsigned long long blocked = 0;
		while (status != NULL && fgets(line, sizeof(line), status) != NULL) {
			sscanf(line, "SigBlk: %llx", &blocked);
		}
		if (status == NULL) {
			continue;
		}
		fclose(status);
		// SIGKILL and SIGSTOP cannot be blocked; 32 to 34 are the C library's own.
		const unsigned long long others = 1ULL << 8 | 1ULL << 18 | 7ULL << 31;
		HOLDS((blocked | others) == ~0ULL);
		++seen;
	}
	closedir(tasks);
	HOLDS(seen >= 2);
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(agent, PATIENCE_MS));
}

// Whatever it is that a start fails for want of a descriptor: the next one finds the outbox free.
static void a_start_that_fails_leaves_the_outbox_free(void) {
	struct rlimit before, few;
	HOLDS(getrlimit(RLIMIT_NOFILE, &before) == 0);
	const int next = dup(STDIN_FILENO);
	close(next);
	p2p_sync_agent agent = 0;
	p2p_sync_code code = P2P_SYNC_ERR_INTERNAL;
	int starts = 0;
	// One is needed to write the configuration.
	for (few = before; code != P2P_SYNC_OK && starts < DESCRIPTORS_MAX; ++starts) {
		few.rlim_cur = (rlim_t)(next + 1 + starts);
		HOLDS(setrlimit(RLIMIT_NOFILE, &few) == 0);
		code = start_agent(1, &agent);
		HOLDS(setrlimit(RLIMIT_NOFILE, &before) == 0);
		HOLDS(code != P2P_SYNC_ERR_DATA_DIRECTORY_IN_USE);
	}
	GIVES(P2P_SYNC_OK, code);
	HOLDS(starts > 2);
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(agent, PATIENCE_MS));
}

void endings(int is_watched) {
	what_one_thread_starts_another_uses_and_ends();
	eight_agents_run_at_once_and_a_ninth_is_refused();
	if (!is_watched) {
		agent_threads_block_every_signal();
		a_start_that_fails_leaves_the_outbox_free();
	}
	an_agent_ends_while_many_threads_call_it();
}

// A child has none of the agent's threads, and perhaps its locks held: every call says so and does nothing.
static void a_child_is_refused(p2p_sync_agent agent) {
	every_call_gives(P2P_SYNC_ERR_FORKED, agent);
	every_call_gives(P2P_SYNC_ERR_FORKED, 0);
	GIVES(P2P_SYNC_ERR_FORKED, p2p_sync_shutdown(agent, PATIENCE_MS));
	GIVES(P2P_SYNC_ERR_FORKED, start_agent(2, &(p2p_sync_agent){0}));
	GIVES(P2P_SYNC_ERR_FORKED, p2p_sync_code_label(P2P_SYNC_ERR_FORKED, NULL, 0, NULL));
	HOLDS(p2p_sync_version() != NULL && p2p_sync_abi_version() == P2P_SYNC_ABI_VERSION);
	p2p_sync_last_error(NULL, 0, NULL);
}

static void fork_a_child_of(p2p_sync_agent agent, int is_watched) {
	const int before = failures_so_far();
	fflush(NULL);
	const pid_t child = fork();
	HOLDS(child >= 0);
	if (child == 0) {
		a_child_is_refused(agent);
		if (is_watched && failures_so_far() == before) {
			raise(SIGKILL);
		}
		// With its exit handlers, as a server's child that gives up.
		exit(failures_so_far() == before ? 0 : 1);
	}
	int status = -1;
	HOLDS(waitpid(child, &status, 0) == child);
	HOLDS(is_watched ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL : WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

void forks(int is_watched) {
	p2p_sync_agent agent = started_agent(1);
	fork_a_child_of(agent, is_watched);
	every_call_gives(P2P_SYNC_OK, agent);

	// In the middle of calls on other threads.
	pthread_t threads[CALLERS];
	caller callers[CALLERS];
	for (int i = 0; i < CALLERS; ++i) {
		callers[i] = (caller){.agent = agent, .number = i};
		HOLDS(pthread_create(&threads[i], NULL, call_until_it_is_shut_down, &callers[i]) == 0);
	}
	for (int i = 0; i < ENDED_UNDER_LOAD; ++i) {
		fork_a_child_of(agent, is_watched);
	}
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(agent, PATIENCE_MS));
	for (int i = 0; i < CALLERS; ++i) {
		pthread_join(threads[i], NULL);
	}
	// The parent goes on.
	agent = started_agent(1);
	every_call_gives(P2P_SYNC_OK, agent);
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(agent, PATIENCE_MS));
}
