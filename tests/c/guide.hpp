// What the code in agent/INTEGRATION.md names of a map server's, put in front of it. Written for this test; only the
// names are such a server's.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#define TIMER_FUNC(name)                                                               \
	int name([[maybe_unused]] int tid, [[maybe_unused]] std::int64_t tick, [[maybe_unused]] int id, \
		[[maybe_unused]] std::intptr_t data)

void ShowError(const char* format, ...) __attribute__((format(printf, 1, 2)));
void ShowWarning(const char* format, ...) __attribute__((format(printf, 1, 2)));
void ShowInfo(const char* format, ...) __attribute__((format(printf, 1, 2)));

using TimerFunc = TIMER_FUNC((*));
std::int64_t gettick();
int add_timer_func_list(TimerFunc function, const char* name);
int add_timer_interval(std::int64_t tick, TimerFunc function, int id, std::intptr_t data, int interval);

struct status_data {
	std::uint32_t hp, max_hp;
	std::uint16_t speed;
};
struct mob_data {
	std::int32_t id;
	std::int16_t mob_id, m, x, y;
	status_data status;
};
const char* map_mapid2mapname(int m);

// What the reader is to write.
void open_map(const std::string& map);
void close_map(const std::string& map);
void end_map(const std::string& map);
