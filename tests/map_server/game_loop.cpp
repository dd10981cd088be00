#include "game_loop.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <unistd.h>

namespace sample {

namespace {

// A map server rests so long after each turn unless a socket has something, and never longer than the second.
constexpr Nanoseconds WAIT_MIN = 20 * MILLISECOND;
constexpr Nanoseconds WAIT_MAX = SECOND;

int listenOnLoopback() {
	const int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	sockaddr_in address{};
	address.sin_family = AF_INET;
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (listener < 0 || bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0
		|| listen(listener, 16) != 0) {
		std::perror("sample_map_server: listening on loopback");
		std::exit(1);
	}
	return listener;
}

int packetsOfClients(double per_second) {
	const int client = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
	if (client < 0) {
		std::perror("sample_map_server: timerfd");
		std::exit(1);
	}
	if (per_second > 0) {
		const auto interval = static_cast<Nanoseconds>(SECOND / per_second);
		itimerspec times{};
		times.it_interval = {interval / SECOND, interval % SECOND};
		times.it_value = times.it_interval;
		timerfd_settime(client, 0, &times, nullptr);
	}
	return client;
}

} // namespace

GameLoop::GameLoop(GameClock& clock, Timers& timers, double packets)
	: clock_(clock), timers_(timers), listener_(listenOnLoopback()), client_(packetsOfClients(packets)) {}

GameLoop::~GameLoop() {
	close(listener_);
	close(client_);
}

void GameLoop::restartMeasuring() {
	turn_ = Histogram();
	oversleep_ = Histogram();
}

void GameLoop::waitForSockets(Nanoseconds until_next_timer) {
	const Nanoseconds wait = std::clamp(until_next_timer, WAIT_MIN, WAIT_MAX);
	fd_set readable;
	FD_ZERO(&readable);
	FD_SET(listener_, &readable);
	FD_SET(client_, &readable);
	timeval timeout{wait / SECOND, wait % SECOND / MICROSECOND};
	const Nanoseconds began = monotonic();
	const int ready = select(std::max(listener_, client_) + 1, &readable, nullptr, nullptr, &timeout);
	if (ready == 0) {
		oversleep_.record(monotonic() - began - wait);
	}
	if (ready > 0 && FD_ISSET(client_, &readable)) {
		// What came is of no matter, only that it ended the wait.
		std::uint64_t came = 0;
		[[maybe_unused]] const ssize_t size = read(client_, &came, sizeof(came));
	}
}

} // namespace sample
