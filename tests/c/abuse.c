// Calls the library in every wrong way that has a code: null, garbage and misaligned arguments, handles that are none,
// sizes of other versions, texts that are none, buffers that are too small. It must never crash.
//
//     abuse FOLDER ENDPOINT CREDENTIAL [watched]
//
// Files are written below FOLDER, which is empty at the start. Nobody listens at ENDPOINT. With `watched`, for
// runs under valgrind or a sanitizer, forked children end by SIGKILL instead of exit(), for to what looks for leaks all
// that the parent's other threads hold is lost in a child; and signal masks, which are then the tool's, are not looked at.
#include "abuse.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>

static _Atomic int failures = 0;
static const char *folder, *endpoint, *credential;

static void failed(const char *file, int line, const char *what, const char *told) {
	++failures;
	fprintf(stderr, "%s:%d: %s: %s\n", file, line, what, told);
}

void check_code(const char *file, int line, const char *call, p2p_sync_code wanted, p2p_sync_code given) {
	if (given != wanted) {
		char told[600], sentence[512] = "";
		p2p_sync_last_error(sentence, sizeof(sentence), NULL);
		snprintf(told, sizeof(told), "gave %" PRId32 ", not %" PRId32 " (%s)", given, wanted, sentence);
		failed(file, line, call, told);
	}
}

void check_refused(const char *file, int line, const char *call, p2p_sync_code given) {
	if (given < 100 || given >= 700) {
		failed(file, line, call, "was not refused with a code");
	}
}

void check_that(const char *file, int line, const char *condition, int holds) {
	if (!holds) {
		failed(file, line, condition, "is not so");
	}
}

int failures_so_far(void) {
	return failures;
}

static void write_file(const char *path, const char *content) {
	FILE *file = fopen(path, "w");
	// It holds a credential.
	if (file == NULL || chmod(path, 0600) != 0 || fputs(content, file) < 0 || fclose(file) != 0) {
		perror(path);
		exit(2);
	}
}

static p2p_sync_code start_from(const char *config_path, p2p_sync_agent *agent) {
	p2p_sync_options options;
	memset(&options, 0, sizeof(options));
	options.struct_size = sizeof(options);
	options.config_path = config_path;
	return p2p_sync_start(&options, agent);
}

static const char *path_of(int number, const char *kind) {
	static _Thread_local char path[4096];
	snprintf(path, sizeof(path), "%s/%d.%s", folder, number, kind);
	return path;
}

// Writes the file of an agent's number, with further lines, and gives its path.
static const char *configuration(int number, const char *kind, const char *more) {
	char config[4096];
	snprintf(config, sizeof(config),
		"main_server_endpoint = %s\nencryption_key = %s\noutbox_path = %d.outbox\n"
		"critical_timeout_ms = 50\nretry_delay_max_ms = 500\n%s",
		endpoint, credential, number, more);
	write_file(path_of(number, kind), config);
	return path_of(number, kind);
}

p2p_sync_code start_agent(int number, p2p_sync_agent *agent) {
	return start_from(configuration(number, "conf", ""), agent);
}

p2p_sync_code start_warned_agent(int number) {
	p2p_sync_agent agent = 0;
	return start_from(configuration(number, "warned.conf", "master_key = none\n"), &agent);
}

p2p_sync_agent started_logging_agent(int number, p2p_sync_log_callback log, void *context) {
	p2p_sync_options options;
	memset(&options, 0, sizeof(options));
	options.struct_size = sizeof(options);
	options.config_path = configuration(number, "conf", "");
	options.log = log;
	options.log_context = context;
	p2p_sync_agent agent = 0;
	GIVES(P2P_SYNC_OK, p2p_sync_start(&options, &agent));
	return agent;
}

p2p_sync_agent started_agent(int number) {
	p2p_sync_agent agent = 0;
	const p2p_sync_code code = start_agent(number, &agent);
	if (code != P2P_SYNC_OK || agent == 0) {
		GIVES(P2P_SYNC_OK, code);
		exit(1);
	}
	return agent;
}

void every_call_gives(p2p_sync_code wanted, p2p_sync_agent agent) {
	const p2p_sync_operation operation = chat_operation();
	p2p_sync_id id;
	memset(&id, 7, sizeof(id));
	p2p_sync_result result = empty_result();
	GIVES(wanted, p2p_sync_submit(agent, &operation, &id));
	GIVES(wanted, p2p_sync_submit_critical(agent, &operation, &id, &result));
	GIVES(wanted, p2p_sync_submit_group(agent, &operation, 1, 0, &id));
	GIVES(wanted, p2p_sync_get_result(agent, &id, &result));
	GIVES(wanted, p2p_sync_wait(agent, &id, 1, &result));
	GIVES(wanted, p2p_sync_wait_for_answer(agent, &id, &result));

	char buffer[4096];
	size_t size = 0;
	GIVES(wanted, p2p_sync_json_string(agent, text_of("x"), buffer, sizeof(buffer), &size));
	p2p_sync_question question;
	memset(&question, 0, sizeof(question));
	question.struct_size = sizeof(question);
	question.kind = P2P_SYNC_ASK_CACHE;
	question.text = text_of("key");
	GIVES(wanted, p2p_sync_ask(agent, &question, &id));
	if (wanted != P2P_SYNC_OK) {
		GIVES(wanted, p2p_sync_get_data(agent, &id, buffer, sizeof(buffer), &size));
	}

	p2p_sync_subscription request;
	memset(&request, 0, sizeof(request));
	request.struct_size = sizeof(request);
	request.stream = text_of("prontera");
	uint64_t subscription = 0;
	GIVES(wanted, p2p_sync_subscribe(agent, &request, &subscription));
	GIVES(wanted, p2p_sync_unsubscribe(agent, subscription));
	size_t events = 0;
	GIVES(wanted, p2p_sync_process(agent, 0, NULL, NULL, &events));
	p2p_sync_event event;
	memset(&event, 0, sizeof(event));
	event.struct_size = sizeof(event);
	GIVES(wanted, p2p_sync_next_event(agent, &event, buffer, sizeof(buffer), &size));

	GIVES(wanted, p2p_sync_cache_set(agent, text_of("key"), text_of("value"), 0));
	GIVES(wanted, p2p_sync_cache_get(agent, text_of("key"), 1, buffer, sizeof(buffer), &size));
	uint8_t is = 0;
	GIVES(wanted, p2p_sync_cache_exists(agent, text_of("key"), 1, &is));
	GIVES(wanted, p2p_sync_cache_delete(agent, text_of("key")));
	GIVES(wanted, p2p_sync_publish(agent, text_of("channel"), text_of("message")));

	p2p_sync_status status;
	memset(&status, 0, sizeof(status));
	status.struct_size = sizeof(status);
	GIVES(wanted, p2p_sync_get_status(agent, &status));
	GIVES(wanted, p2p_sync_get_status_json(agent, buffer, sizeof(buffer), &size));
	GIVES(wanted, p2p_sync_flush(agent, 1, &is));
	int32_t lease = 0;
	GIVES(wanted, p2p_sync_get_lease(agent, text_of("prontera"), &lease));
}

static void nothing_answers_before_a_start(void) {
	every_call_gives(P2P_SYNC_ERR_BAD_HANDLE, 0);
	every_call_gives(P2P_SYNC_ERR_BAD_HANDLE, (uint64_t)1 << 32 | 1);
	GIVES(P2P_SYNC_ERR_BAD_HANDLE, p2p_sync_shutdown(0, 0));
	char sentence[8];
	size_t size = 0;
	memset(sentence, 'x', sizeof(sentence));
	GIVES(P2P_SYNC_ERR_BAD_HANDLE, p2p_sync_last_error(sentence, sizeof(sentence), &size));
	HOLDS(size >= sizeof(sentence) && sentence[7] == '\0' && sentence[6] != '\0');
	GIVES(P2P_SYNC_ERR_BAD_HANDLE, p2p_sync_last_error(NULL, 0, NULL));
	GIVES(P2P_SYNC_ERR_BAD_HANDLE, p2p_sync_last_error(sentence, 0, NULL));
	GIVES(P2P_SYNC_ERR_BAD_HANDLE, p2p_sync_last_error(NULL, 10, &size));
}

static void no_number_but_the_given_one_is_a_handle(p2p_sync_agent agent) {
	const p2p_sync_agent none[] = {0, 1, 8, 9, UINT32_MAX, (uint64_t)1 << 32, (uint64_t)1 << 63, UINT64_MAX,
		agent + 1, agent - 1, agent + ((uint64_t)1 << 32), agent ^ (uint64_t)0xff00, (uint64_t)(uintptr_t)&agent};
	for (size_t i = 0; i < sizeof(none) / sizeof(none[0]); ++i) {
		every_call_gives(P2P_SYNC_ERR_BAD_HANDLE, none[i]);
		GIVES(P2P_SYNC_ERR_BAD_HANDLE, p2p_sync_shutdown(none[i], 0));
	}
	every_call_gives(P2P_SYNC_OK, agent);
}

static void nulls_are_refused_and_write_nothing(p2p_sync_agent agent) {
	const p2p_sync_operation operation = chat_operation();
	p2p_sync_result result = empty_result();
	p2p_sync_id id, before;
	memset(&id, 0xa5, sizeof(id));
	before = id;
	const p2p_sync_code is_null = P2P_SYNC_ERR_NULL_ARGUMENT;
	GIVES(is_null, p2p_sync_submit(agent, NULL, &id));
	GIVES(is_null, p2p_sync_submit(agent, &operation, NULL));
	GIVES(is_null, p2p_sync_submit_critical(agent, NULL, &id, &result));
	GIVES(is_null, p2p_sync_submit_critical(agent, &operation, NULL, &result));
	GIVES(is_null, p2p_sync_submit_critical(agent, &operation, &id, NULL));
	GIVES(is_null, p2p_sync_submit_group(agent, NULL, 1, 0, &id));
	GIVES(is_null, p2p_sync_submit_group(agent, &operation, 1, 0, NULL));
	GIVES(is_null, p2p_sync_get_result(agent, NULL, &result));
	GIVES(is_null, p2p_sync_get_result(agent, &id, NULL));
	GIVES(is_null, p2p_sync_wait(agent, NULL, 1, &result));
	GIVES(is_null, p2p_sync_wait(agent, &id, 1, NULL));
	GIVES(is_null, p2p_sync_wait_for_answer(agent, NULL, &result));
	GIVES(is_null, p2p_sync_wait_for_answer(agent, &id, NULL));
	GIVES(is_null, p2p_sync_ask(agent, NULL, &id));
	GIVES(is_null, p2p_sync_get_data(agent, NULL, NULL, 0, NULL));
	GIVES(is_null, p2p_sync_subscribe(agent, NULL, NULL));
	GIVES(is_null, p2p_sync_next_event(agent, NULL, NULL, 0, NULL));
	GIVES(is_null, p2p_sync_cache_exists(agent, text_of("key"), 1, NULL));
	GIVES(is_null, p2p_sync_get_status(agent, NULL));
	GIVES(is_null, p2p_sync_get_status_json(agent, NULL, 1, NULL));
	GIVES(is_null, p2p_sync_flush(agent, 1, NULL));
	GIVES(is_null, p2p_sync_get_lease(agent, text_of("prontera"), NULL));
	GIVES(is_null, p2p_sync_json_string(agent, text_of("x"), NULL, 1, NULL));
	GIVES(is_null, p2p_sync_code_label(P2P_SYNC_ERR_TOO_LARGE, NULL, 1, NULL));
	GIVES(is_null, p2p_sync_start(NULL, &agent));

	// A text of some size and no bytes.
	const p2p_sync_text nowhere = {NULL, 5}, anywhere = {NULL, 0};
	p2p_sync_operation without = operation;
	without.payload = nowhere;
	GIVES(is_null, p2p_sync_submit(agent, &without, &id));
	without = operation;
	without.map = nowhere;
	GIVES(is_null, p2p_sync_submit(agent, &without, &id));
	GIVES(is_null, p2p_sync_cache_set(agent, nowhere, text_of("value"), 0));
	GIVES(is_null, p2p_sync_cache_set(agent, text_of("key"), nowhere, 0));
	GIVES(is_null, p2p_sync_publish(agent, nowhere, text_of("message")));
	GIVES(is_null, p2p_sync_get_lease(agent, nowhere, &(int32_t){0}));
	GIVES(P2P_SYNC_OK, p2p_sync_json_string(agent, anywhere, (char[3]){0}, 3, NULL));
	HOLDS(memcmp(&id, &before, sizeof(id)) == 0);
	HOLDS(result.state == 0 && result.code == 0 && result.message[0] == '\0');
}

static void misaligned_structs_are_refused(p2p_sync_agent agent) {
	_Alignas(16) static unsigned char bytes[8192];
	void *const odd = bytes + 1;
	p2p_sync_id id;
	memset(&id, 7, sizeof(id));
	p2p_sync_result result = empty_result();
	const p2p_sync_operation operation = chat_operation();
	memcpy(odd, &operation, sizeof(operation));
	const p2p_sync_code is_bad = P2P_SYNC_ERR_BAD_ARGUMENT;
	GIVES(is_bad, p2p_sync_submit(agent, odd, &id));
	GIVES(is_bad, p2p_sync_submit_critical(agent, &operation, &id, odd));
	GIVES(is_bad, p2p_sync_submit_group(agent, odd, 1, 0, &id));
	GIVES(is_bad, p2p_sync_get_result(agent, &id, odd));
	GIVES(is_bad, p2p_sync_wait(agent, &id, 1, odd));
	GIVES(is_bad, p2p_sync_wait_for_answer(agent, &id, odd));
	GIVES(is_bad, p2p_sync_ask(agent, odd, &id));
	GIVES(is_bad, p2p_sync_subscribe(agent, odd, &(uint64_t){0}));
	GIVES(is_bad, p2p_sync_next_event(agent, odd, NULL, 0, NULL));
	GIVES(is_bad, p2p_sync_get_status(agent, odd));
	GIVES(is_bad, p2p_sync_start(odd, &agent));
	// An id is of bytes: it lies anywhere.
	GIVES(P2P_SYNC_OK, p2p_sync_submit(agent, &operation, odd));
	GIVES(P2P_SYNC_OK, p2p_sync_get_result(agent, odd, &result));
	HOLDS(result.state == P2P_SYNC_ACCEPTED || result.state == P2P_SYNC_SPOOLED);
}

// A struct of a later version of the header, with a field more than the library knows.
typedef struct {
	p2p_sync_operation known;
	uint64_t later[2];
} later_operation;
typedef struct {
	p2p_sync_result known;
	uint64_t later[2];
} later_result;

static void structs_of_other_sizes_have_a_code(p2p_sync_agent agent) {
	later_operation operation;
	memset(&operation, 0, sizeof(operation));
	operation.known = chat_operation();
	later_result result;
	p2p_sync_id id;
	memset(&id, 7, sizeof(id));
	const p2p_sync_code is_bad = P2P_SYNC_ERR_BAD_STRUCT_SIZE;
	// The smallest struct is that of the options.
	const size_t sizes[] = {0, 1, sizeof(size_t), sizeof(p2p_sync_options) - 1, 4097, SIZE_MAX / 2, SIZE_MAX};
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); ++i) {
		operation.known.struct_size = sizes[i];
		GIVES(is_bad, p2p_sync_submit(agent, &operation.known, &id));
		GIVES(is_bad, p2p_sync_submit_group(agent, &operation.known, 1, 0, &id));
		GIVES(is_bad, p2p_sync_submit_critical(agent, &operation.known, &id, &result.known));
		memset(&result, 0, sizeof(result));
		result.known.struct_size = sizes[i];
		GIVES(is_bad, p2p_sync_get_result(agent, &id, &result.known));
		p2p_sync_status status = {.struct_size = sizes[i]};
		GIVES(is_bad, p2p_sync_get_status(agent, &status));
		p2p_sync_event event = {.struct_size = sizes[i]};
		GIVES(is_bad, p2p_sync_next_event(agent, &event, NULL, 0, NULL));
		p2p_sync_question question = {.struct_size = sizes[i]};
		GIVES(is_bad, p2p_sync_ask(agent, &question, &id));
		p2p_sync_subscription request = {.struct_size = sizes[i]};
		GIVES(is_bad, p2p_sync_subscribe(agent, &request, &(uint64_t){0}));
		p2p_sync_options options = {.struct_size = sizes[i]};
		GIVES(is_bad, p2p_sync_start(&options, &(p2p_sync_agent){0}));
	}
	operation.known.struct_size = sizeof(p2p_sync_operation) - 1;
	GIVES(is_bad, p2p_sync_submit(agent, &operation.known, &id));
	operation.known.struct_size = sizeof(operation);
	GIVES(P2P_SYNC_OK, p2p_sync_submit(agent, &operation.known, &id));
	operation.later[1] = 1;
	GIVES(is_bad, p2p_sync_submit(agent, &operation.known, &id));

	memset(&result, 0xa5, sizeof(result));
	result.known.struct_size = sizeof(result);
	GIVES(P2P_SYNC_OK, p2p_sync_get_result(agent, &id, &result.known));
	HOLDS(result.known.struct_size == sizeof(result) && result.known.state != 0);
	HOLDS(result.later[0] == UINT64_C(0xa5a5a5a5a5a5a5a5) && result.later[1] == result.later[0]);

	// In an array of later structs each lies as far from the next as the first says.
	later_operation two[2];
	memset(two, 0, sizeof(two));
	two[0].known = two[1].known = chat_operation();
	two[0].known.struct_size = two[1].known.struct_size = sizeof(two[0]);
	two[1].known.payload = text_of("{\"char_id\":150002,\"text\":\"hi\"}");
	GIVES(P2P_SYNC_OK, p2p_sync_submit_group(agent, &two[0].known, 2, 0, &id));
	two[1].later[0] = 1;
	GIVES(is_bad, p2p_sync_submit_group(agent, &two[0].known, 2, 0, &id));
	two[1].later[0] = 0;

	// An element of another size than the first would be read beyond its end.
	for (size_t more = sizeof(p2p_sync_operation); more <= 4096; more *= 2) {
		two[1].known.struct_size = more;
		if (more != sizeof(two[0])) {
			GIVES(is_bad, p2p_sync_submit_group(agent, &two[0].known, 2, 0, &id));
		}
	}
	p2p_sync_operation *apart = calloc(2, sizeof(p2p_sync_operation));
	apart[0] = apart[1] = chat_operation();
	apart[1].payload = text_of("{\"char_id\":150002,\"text\":\"hi\"}");
	apart[1].struct_size = 4096;
	GIVES(is_bad, p2p_sync_submit_group(agent, apart, 2, 0, &id));
	free(apart);
}

static void texts_that_are_none_have_a_code(p2p_sync_agent agent) {
	p2p_sync_id id;
	const char *not_utf8 = "prontera\xff";
	const p2p_sync_code is_bad = P2P_SYNC_ERR_BAD_TEXT;
	GIVES(is_bad, p2p_sync_cache_set(agent, text_of(not_utf8), text_of("value"), 0));
	GIVES(is_bad, p2p_sync_cache_set(agent, text_of("key"), text_of(not_utf8), 0));
	GIVES(is_bad, p2p_sync_cache_get(agent, text_of(not_utf8), 1, NULL, 0, NULL));
	GIVES(is_bad, p2p_sync_cache_exists(agent, text_of(not_utf8), 1, &(uint8_t){0}));
	GIVES(is_bad, p2p_sync_cache_delete(agent, text_of(not_utf8)));
	GIVES(is_bad, p2p_sync_publish(agent, text_of("channel"), text_of(not_utf8)));
	GIVES(is_bad, p2p_sync_get_lease(agent, text_of(not_utf8), &(int32_t){0}));
	p2p_sync_subscription request = {.struct_size = sizeof(request), .stream = text_of(not_utf8)};
	GIVES(is_bad, p2p_sync_subscribe(agent, &request, &(uint64_t){0}));
	p2p_sync_question question = {.struct_size = sizeof(question), .kind = P2P_SYNC_ASK_CACHE};
	question.text = text_of(not_utf8);
	GIVES(is_bad, p2p_sync_ask(agent, &question, &id));

	// What an operation carries is never a reason to lose it.
	p2p_sync_operation operation = chat_operation();
	operation.payload = text_of("{\"char_id\":150001,\"text\":\"\xff\xfe\xc0\x80\"}");
	GIVES(P2P_SYNC_OK, p2p_sync_submit(agent, &operation, &id));
	p2p_sync_status status = {.struct_size = sizeof(status)};
	GIVES(P2P_SYNC_OK, p2p_sync_get_status(agent, &status));
	HOLDS(status.texts_escaped == 1);

	operation.payload = text_of("{\"char_id\":");
	GIVES(P2P_SYNC_ERR_INVALID_JSON, p2p_sync_submit(agent, &operation, &id));
	operation.payload = text_of("");
	GIVES(P2P_SYNC_ERR_INVALID_JSON, p2p_sync_submit(agent, &operation, &id));
	operation.payload = (p2p_sync_text){"{\"char_id\":1,\"text\":\"a\0b\"}", 26};
	REFUSES(p2p_sync_submit(agent, &operation, &id));
	operation = chat_operation();
	operation.map = text_of("../etc");
	REFUSES(p2p_sync_submit(agent, &operation, &id));
	operation.map = (p2p_sync_text){NULL, 0};
	REFUSES(p2p_sync_submit(agent, &operation, &id));
}

static void sizes_beyond_every_bound_have_a_code(p2p_sync_agent agent) {
	const size_t large_bytes = 16 * 1024 * 1024;
	char *large = malloc(large_bytes);
	memset(large, ' ', large_bytes);
	large[0] = '[';
	large[large_bytes - 1] = ']';
	const p2p_sync_text text = {large, large_bytes}, impossible = {large, SIZE_MAX}, key = {large, 257};
	p2p_sync_id id;
	p2p_sync_operation operation = chat_operation();
	operation.payload = text;
	GIVES(P2P_SYNC_ERR_TOO_LARGE, p2p_sync_submit(agent, &operation, &id));
	operation.payload = impossible;
	GIVES(P2P_SYNC_ERR_BAD_ARGUMENT, p2p_sync_submit(agent, &operation, &id));
	operation = chat_operation();
	operation.entity = text;
	REFUSES(p2p_sync_submit(agent, &operation, &id));
	operation.entity = (p2p_sync_text){NULL, 0};
	operation.map = text;
	REFUSES(p2p_sync_submit(agent, &operation, &id));
	GIVES(P2P_SYNC_ERR_TOO_LARGE, p2p_sync_cache_set(agent, text_of("key"), text, 0));
	REFUSES(p2p_sync_cache_set(agent, key, text_of("value"), 0));
	REFUSES(p2p_sync_cache_set(agent, text_of(""), text_of("value"), 0));
	REFUSES(p2p_sync_cache_get(agent, key, 1, NULL, 0, NULL));
	GIVES(P2P_SYNC_ERR_BAD_ARGUMENT, p2p_sync_cache_set(agent, impossible, text_of("value"), 0));
	REFUSES(p2p_sync_publish(agent, text_of("channel"), text));
	REFUSES(p2p_sync_get_lease(agent, text, &(int32_t){0}));
	p2p_sync_subscription request = {.struct_size = sizeof(request), .stream = text};
	REFUSES(p2p_sync_subscribe(agent, &request, &(uint64_t){0}));
	p2p_sync_question question = {.struct_size = sizeof(question), .kind = P2P_SYNC_ASK_EMBEDDING, .text = text};
	REFUSES(p2p_sync_ask(agent, &question, &id));
	for (size_t count = 0; count < 3; ++count) {
		const size_t counts[] = {0, 65, SIZE_MAX};
		GIVES(P2P_SYNC_ERR_BAD_ARGUMENT, p2p_sync_submit_group(agent, &operation, counts[count], 0, &id));
	}
	free(large);
}

static void unknown_numbers_have_a_code(p2p_sync_agent agent) {
	const int32_t types[] = {-1, 13, 63, INT32_MAX, INT32_MIN};
	p2p_sync_id id;
	for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); ++i) {
		p2p_sync_operation operation = chat_operation();
		operation.data_type = types[i];
		GIVES(P2P_SYNC_ERR_UNKNOWN_TYPE, p2p_sync_submit(agent, &operation, &id));
		p2p_sync_subscription request = {.struct_size = sizeof(request), .stream = text_of("prontera")};
		request.types = &types[i];
		request.types_count = 1;
		GIVES(P2P_SYNC_ERR_UNKNOWN_TYPE, p2p_sync_subscribe(agent, &request, &(uint64_t){0}));
		p2p_sync_question question = {.struct_size = sizeof(question), .kind = P2P_SYNC_ASK_STATE};
		question.data_type = types[i];
		GIVES(P2P_SYNC_ERR_UNKNOWN_TYPE, p2p_sync_ask(agent, &question, &id));
		question.data_type = 0;
		question.kind = types[i];
		GIVES(P2P_SYNC_ERR_BAD_ARGUMENT, p2p_sync_ask(agent, &question, &id));
		p2p_sync_options options = {.struct_size = sizeof(options), .config_path = "none", .log_level = types[i]};
		GIVES(P2P_SYNC_ERR_BAD_ARGUMENT, p2p_sync_start(&options, &(p2p_sync_agent){0}));
		GIVES(P2P_SYNC_ERR_BAD_ARGUMENT, p2p_sync_code_label(types[i], NULL, 0, NULL));
	}
	p2p_sync_operation operation = chat_operation();
	operation.flags = 8;
	GIVES(P2P_SYNC_ERR_BAD_ARGUMENT, p2p_sync_submit(agent, &operation, &id));
	operation.flags = UINT32_MAX;
	GIVES(P2P_SYNC_ERR_BAD_ARGUMENT, p2p_sync_submit_group(agent, &operation, 1, 0, &id));
	operation.flags = 0;
	GIVES(P2P_SYNC_ERR_BAD_ARGUMENT, p2p_sync_submit_group(agent, &operation, 1, P2P_SYNC_DELETE, &id));
	p2p_sync_subscription request = {.struct_size = sizeof(request), .stream = text_of("prontera")};
	request.types_count = 1;
	GIVES(P2P_SYNC_ERR_NULL_ARGUMENT, p2p_sync_subscribe(agent, &request, &(uint64_t){0}));
	request.types = types;
	request.types_count = SIZE_MAX;
	GIVES(P2P_SYNC_ERR_BAD_ARGUMENT, p2p_sync_subscribe(agent, &request, &(uint64_t){0}));
	GIVES(P2P_SYNC_ERR_NOT_FOUND, p2p_sync_unsubscribe(agent, UINT64_MAX));
}

// With nobody at the other end the call succeeds, and says that the outcome is not known.
static void a_waiting_call_without_an_answer_is_unknown(p2p_sync_agent agent) {
	const p2p_sync_operation operation = chat_operation();
	p2p_sync_id id;
	p2p_sync_result result = empty_result();
	GIVES(P2P_SYNC_OK, p2p_sync_submit_critical(agent, &operation, &id, &result));
	HOLDS(result.state == P2P_SYNC_UNKNOWN && result.code == P2P_SYNC_ERR_UNKNOWN_OUTCOME && result.message[0] != '\0');
	GIVES(P2P_SYNC_OK, p2p_sync_wait(agent, &id, 1, &result));
	HOLDS(result.state == P2P_SYNC_UNKNOWN && result.code == P2P_SYNC_ERR_UNKNOWN_OUTCOME);
	GIVES(P2P_SYNC_OK, p2p_sync_get_result(agent, &id, &result));
	HOLDS(result.state == P2P_SYNC_ACCEPTED || result.state == P2P_SYNC_SPOOLED);
	HOLDS(result.code == P2P_SYNC_OK && result.message[0] == '\0' && result.at_ms > 0 && result.data_size == 0);
}

static void small_buffers_are_told_the_size_and_left_alone(p2p_sync_agent agent) {
	char buffer[4096];
	size_t size = 0;
	GIVES(P2P_SYNC_ERR_BUFFER_TOO_SMALL, p2p_sync_get_status_json(agent, NULL, 0, &size));
	HOLDS(size > 100 && size < sizeof(buffer));
	for (size_t capacity = 0; capacity < 100; ++capacity) {
		memset(buffer, 'x', sizeof(buffer));
		size = 0;
		GIVES(P2P_SYNC_ERR_BUFFER_TOO_SMALL, p2p_sync_get_status_json(agent, buffer, capacity, &size));
		HOLDS(size > 100 && buffer[0] == 'x' && buffer[capacity] == 'x');
	}
	GIVES(P2P_SYNC_ERR_BUFFER_TOO_SMALL, p2p_sync_json_string(agent, text_of("abc"), buffer, 5, &size));
	HOLDS(size == 5);
	memset(buffer, 'x', sizeof(buffer));
	GIVES(P2P_SYNC_OK, p2p_sync_json_string(agent, text_of("abc"), buffer, 6, NULL));
	HOLDS(memcmp(buffer, "\"abc\"\0x", 7) == 0);
	GIVES(P2P_SYNC_ERR_BUFFER_TOO_SMALL, p2p_sync_code_label(P2P_SYNC_ERR_TOO_LARGE, buffer, 9, &size));
	GIVES(P2P_SYNC_OK, p2p_sync_code_label(P2P_SYNC_ERR_TOO_LARGE, buffer, 10, &size));
	HOLDS(size == 9 && strcmp(buffer, "TOO_LARGE") == 0);

	// Seen here at once, with nobody at the other end.
	GIVES(P2P_SYNC_OK, p2p_sync_cache_set(agent, text_of("near"), text_of("value"), 60));
	GIVES(P2P_SYNC_ERR_BUFFER_TOO_SMALL, p2p_sync_cache_get(agent, text_of("near"), 1, buffer, 5, &size));
	HOLDS(size == 5);
	GIVES(P2P_SYNC_OK, p2p_sync_cache_get(agent, text_of("near"), 1, buffer, 6, &size));
	HOLDS(strcmp(buffer, "value") == 0);

	p2p_sync_id id;
	memset(&id, 7, sizeof(id));
	GIVES(P2P_SYNC_ERR_NOT_FOUND, p2p_sync_get_data(agent, &id, buffer, sizeof(buffer), &size));
	p2p_sync_result result = empty_result();
	GIVES(P2P_SYNC_OK, p2p_sync_get_result(agent, &id, &result));
	HOLDS(result.state == P2P_SYNC_NOT_KEPT);
}

static void a_start_without_a_usable_file_has_a_code(void) {
	p2p_sync_agent agent = 77;
	const p2p_sync_code is_unreadable = P2P_SYNC_ERR_CONFIG_UNREADABLE;
	GIVES(is_unreadable, start_from("/nowhere/p2p_data_sync.conf", &agent));
	GIVES(is_unreadable, start_from("", &agent));
	GIVES(is_unreadable, start_from(folder, &agent));
	GIVES(is_unreadable, start_from("\xff\xfe", &agent));
	GIVES(P2P_SYNC_ERR_NULL_ARGUMENT, start_from(NULL, &agent));
	write_file(path_of(99, "conf"), "\x01\x02 garbage\nmain_server_endpoint = nonsense\n");
	REFUSES(start_from(path_of(99, "conf"), &agent));
	char *long_path = malloc(100001);
	memset(long_path, 'x', 100000);
	long_path[100000] = '\0';
	GIVES(is_unreadable, start_from(long_path, &agent));
	free(long_path);
	HOLDS(agent == 77);
}

int main(int count, char **arguments) {
	if (count != 4 && count != 5) {
		fprintf(stderr, "usage: %s FOLDER ENDPOINT CREDENTIAL [watched]\n", arguments[0]);
		return 2;
	}
	folder = arguments[1];
	endpoint = arguments[2];
	credential = arguments[3];
	nothing_answers_before_a_start();
	a_start_without_a_usable_file_has_a_code();

	const p2p_sync_agent agent = started_agent(1);
	GIVES(P2P_SYNC_ERR_DATA_DIRECTORY_IN_USE, start_agent(1, &(p2p_sync_agent){0}));
	no_number_but_the_given_one_is_a_handle(agent);
	nulls_are_refused_and_write_nothing(agent);
	misaligned_structs_are_refused(agent);
	structs_of_other_sizes_have_a_code(agent);
	texts_that_are_none_have_a_code(agent);
	sizes_beyond_every_bound_have_a_code(agent);
	unknown_numbers_have_a_code(agent);
	small_buffers_are_told_the_size_and_left_alone(agent);
	a_waiting_call_without_an_answer_is_unknown(agent);
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(agent, 0));
	GIVES(P2P_SYNC_OK, p2p_sync_shutdown(agent, 0));
	every_call_gives(P2P_SYNC_ERR_SHUT_DOWN, agent);

	const int is_watched = count == 5;
	endings(is_watched);
	lines();
	// Last: from here on the process has had children.
	forks(is_watched);
	if (failures > 0) {
		fprintf(stderr, "%d checks failed\n", failures);
		return 1;
	}
	puts("every misuse has a code");
	return 0;
}
