// The loop of a map server: timers first, then sockets.
#pragma once

#include <sys/select.h>

#include "game_clock.hpp"
#include "histogram.hpp"
#include "timers.hpp"

namespace sample {

class GameLoop {
public:
	// `packets` of clients a second come in; 0: none.
	GameLoop(GameClock& clock, Timers& timers, double packets);
	~GameLoop();
	GameLoop(const GameLoop&) = delete;
	GameLoop& operator=(const GameLoop&) = delete;

	// One turn; `run` is called with each timer that is due.
	template <typename Run>
	void turn(Run&& run) {
		const Nanoseconds began = clock_.now();
		const Nanoseconds next = timers_.run(run);
		const Nanoseconds ended = clock_.now();
		turn_.record(ended - began);
		waitForSockets(next - ended);
	}

	void restartMeasuring();

	// The work of a turn, without the wait for sockets; and how much longer that took than was asked for.
	const Histogram& turnTime() const { return turn_; }
	const Histogram& oversleep() const { return oversleep_; }

private:
	void waitForSockets(Nanoseconds until_next_timer);

	GameClock& clock_;
	Timers& timers_;
	// Where clients would connect, and what stands for their packets.
	int listener_;
	int client_;
	Histogram turn_, oversleep_;
};

} // namespace sample
