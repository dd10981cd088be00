// What the two halves of the program `stress` share.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

#include <sys/stat.h>

#include "p2p_data_sync.hpp"

// Ends the program where a condition does not hold: what comes behind would only hide it.
#define HOLDS(condition, ...)                                                                      \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			std::fprintf(stderr, "%s:%d: not so: %s: ", __FILE__, __LINE__, #condition);   \
			std::fprintf(stderr, __VA_ARGS__);                                         \
			std::fputc('\n', stderr);                                                  \
			std::exit(1);                                                              \
		}                                                                                  \
	} while (false)

// How often the hub is tried again matters to neither half: it is there or it is not.
inline std::string configuration(const std::string& folder, const std::string& name, const std::string& endpoint,
	const std::string& credential) {
	const std::string path = folder + "/" + name + ".conf";
	std::ofstream(path) << "main_server_endpoint = " << endpoint << "\nencryption_key = " << credential
						<< "\noutbox_path = " << name << ".outbox\ncritical_timeout_ms = 50\nretry_delay_max_ms = 500\n"
						<< "result_keep_seconds = 86400\n";
	// It holds a credential.
	if (chmod(path.c_str(), 0600) != 0) {
		std::perror(path.c_str());
		std::exit(1);
	}
	return path;
}

// Makes so many calls from so many threads; with a hub it also waits until everything is settled.
void callMuch(const std::string& config, const std::string& own_config, unsigned long calls, unsigned threads,
	bool has_hub);

// Starts and ends the library so many times; `counts_bytes` where the allocator can tell what it has given out.
void startAndEnd(const std::string& config, unsigned long cycles, bool counts_bytes);
