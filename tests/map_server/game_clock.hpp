// The time of the game: it stands still while a call waits for the hub.
#pragma once

#include <cstdint>
#include <ctime>

namespace sample {

using Nanoseconds = std::int64_t;

constexpr Nanoseconds MICROSECOND = 1000;
constexpr Nanoseconds MILLISECOND = 1000 * MICROSECOND;
constexpr Nanoseconds SECOND = 1000 * MILLISECOND;

inline Nanoseconds readClock(clockid_t clock) {
	timespec now;
	clock_gettime(clock, &now);
	return static_cast<Nanoseconds>(now.tv_sec) * SECOND + now.tv_nsec;
}

inline Nanoseconds monotonic() { return readClock(CLOCK_MONOTONIC); }

// A call that waits stops the loop by its nature: what it took is told apart, and no timer is late by it.
class GameClock {
public:
	Nanoseconds now() const { return monotonic() - stood_still_; }
	void stoodStill(Nanoseconds time) { stood_still_ += time; }
	Nanoseconds stoodStill() const { return stood_still_; }

private:
	Nanoseconds stood_still_ = 0;
};

} // namespace sample
