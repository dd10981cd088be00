// Work for its own sake: arithmetic that takes the same time in every run of one machine.
#pragma once

#include <cstdint>

#include "game_clock.hpp"

namespace sample {

class Spin {
public:
	explicit Spin(std::uint64_t rounds) : rounds_(rounds) {}

	void operator()() const {
		std::uint64_t state = 1;
		for (std::uint64_t round = 0; round < rounds_; ++round) {
			state ^= state << 13;
			state ^= state >> 7;
			state ^= state << 17;
		}
		// Nobody needs the outcome, and the compiler must not know.
		asm volatile("" : : "r"(state));
	}

	// The rounds that take so long on this core, undisturbed: of the thread's own time, the fastest of some tries.
	static std::uint64_t roundsFor(Nanoseconds time) {
		constexpr std::uint64_t TRIED = 1000000;
		Nanoseconds fastest = SECOND;
		for (int attempt = 0; attempt < 40; ++attempt) {
			const Nanoseconds began = readClock(CLOCK_THREAD_CPUTIME_ID);
			Spin{TRIED}();
			const Nanoseconds took = readClock(CLOCK_THREAD_CPUTIME_ID) - began;
			fastest = took < fastest ? took : fastest;
		}
		return static_cast<std::uint64_t>(time) * TRIED / static_cast<std::uint64_t>(fastest < 1 ? 1 : fastest);
	}

private:
	std::uint64_t rounds_;
};

} // namespace sample
