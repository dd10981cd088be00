// What this process takes of the machine.
#pragma once

#include <cstdint>

namespace sample {

struct ProcessFigures {
	// KiB: all that is resident, and of it what no file backs.
	std::uint64_t resident = 0;
	std::uint64_t anonymous = 0;
	std::uint64_t resident_peak = 0;
	std::uint32_t descriptors = 0;
	std::uint32_t threads = 0;
};

ProcessFigures processFigures();

} // namespace sample
