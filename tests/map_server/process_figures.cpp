#include "process_figures.hpp"

#include <cstdio>
#include <dirent.h>

namespace sample {

namespace {

std::uint32_t entries(const char* directory) {
	std::uint32_t count = 0;
	DIR* const opened = opendir(directory);
	if (opened == nullptr) {
		return 0;
	}
	while (const dirent* entry = readdir(opened)) {
		count += entry->d_name[0] != '.';
	}
	closedir(opened);
	return count;
}

} // namespace

ProcessFigures processFigures() {
	ProcessFigures figures;
	// The directory that is read is itself a descriptor.
	figures.descriptors = entries("/proc/self/fd") - 1;
	figures.threads = entries("/proc/self/task");
	std::FILE* const status = std::fopen("/proc/self/status", "r");
	if (status == nullptr) {
		return figures;
	}
	char line[256];
	while (std::fgets(line, sizeof(line), status) != nullptr) {
		unsigned long long kib = 0;
		if (std::sscanf(line, "VmRSS: %llu", &kib) == 1) {
			figures.resident = kib;
		} else if (std::sscanf(line, "RssAnon: %llu", &kib) == 1) {
			figures.anonymous = kib;
		} else if (std::sscanf(line, "VmHWM: %llu", &kib) == 1) {
			figures.resident_peak = kib;
		}
	}
	std::fclose(status);
	return figures;
}

} // namespace sample
