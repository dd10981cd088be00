// What the parts of the program `abuse` share: checks that tell where they failed, and agents to be abused.
#ifndef ABUSE_H
#define ABUSE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "p2p_sync.h"


// Fails unless `call` gives the code `wanted`, a number of p2p_sync_error or P2P_SYNC_OK.
#define GIVES(wanted, call) check_code(__FILE__, __LINE__, #call, (wanted), (call))
// Fails unless `call` is refused, with whatever code.
#define REFUSES(call) check_refused(__FILE__, __LINE__, #call, (call))
#define HOLDS(condition) check_that(__FILE__, __LINE__, #condition, (condition))

void check_code(const char *file, int line, const char *call, p2p_sync_code wanted, p2p_sync_code given);
void check_refused(const char *file, int line, const char *call, p2p_sync_code given);
void check_that(const char *file, int line, const char *condition, int holds);
int failures_so_far(void);

// Starts the agent of a number, each with an outbox of its own in the folder the program was given.
p2p_sync_code start_agent(int number, p2p_sync_agent *agent);
// The same, which has to succeed.
p2p_sync_agent started_agent(int number);

// The same, with a logger.
p2p_sync_agent started_logging_agent(int number, p2p_sync_log_callback log, void *context);
// The same with a file that a line of the log warns of; gives the code, and names the agent nowhere.
p2p_sync_code start_warned_agent(int number);

// Calls every export that takes a handle with arguments that are right; each has to give `wanted`.
void every_call_gives(p2p_sync_code wanted, p2p_sync_agent agent);

static inline p2p_sync_text text_of(const char *given) {
	p2p_sync_text text = {given, strlen(given)};
	return text;
}

// A chat message, which is kept, and told one after the other.
static inline p2p_sync_operation chat_operation(void) {
	p2p_sync_operation operation;
	memset(&operation, 0, sizeof(operation));
	operation.struct_size = sizeof(operation);
	operation.data_type = P2P_SYNC_CHAT_MESSAGE;
	operation.account_id = 2000001;
	operation.map = text_of("prontera");
	operation.payload = text_of("{\"char_id\":150001,\"text\":\"hi\"}");
	return operation;
}

static inline p2p_sync_result empty_result(void) {
	p2p_sync_result result;
	memset(&result, 0, sizeof(result));
	result.struct_size = sizeof(result);
	return result;
}

// Under a tool such as valgrind, see the head of abuse.c.
void endings(int is_watched);
void forks(int is_watched);
void lines(void);

#endif
