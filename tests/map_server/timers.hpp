// The game's timers, and how late they are.
#pragma once

#include <array>
#include <cstdint>
#include <queue>
#include <vector>

#include "game_clock.hpp"
#include "histogram.hpp"

namespace sample {

enum class TimerKind : std::uint8_t {
	MOB_AI,
	NATURAL_HEAL,
	AUTOSAVE,
	DRAIN,
	PLAYER_WALK,
	MONSTER_WALK,
	START_NPC,
	CHAT,
	DROP,
	PICK_UP,
	NPC_EVENT,
	QUEST,
	HIT,
	MAP_USERS,
	MAP_CHANGE,
	COUNT,
};

constexpr std::size_t TIMER_KINDS = static_cast<std::size_t>(TimerKind::COUNT);

const char* timerName(TimerKind kind);

struct Timer {
	Nanoseconds due;
	TimerKind kind;
	// Whose, where the kind has several.
	std::uint32_t subject;
};

class Timers {
public:
	explicit Timers(const GameClock& clock) : clock_(clock) {}

	void add(Nanoseconds due, TimerKind kind, std::uint32_t subject = 0) { waiting_.push({due, kind, subject}); }

	// Runs what is due at the time of the call; gives when the next is due.
	template <typename Run>
	Nanoseconds run(Run&& run) {
		const Nanoseconds tick = clock_.now();
		while (waiting_.top().due <= tick) {
			const Timer timer = waiting_.top();
			waiting_.pop();
			const Nanoseconds late = clock_.now() - timer.due;
			lateness_[static_cast<std::size_t>(timer.kind)].record(late);
			lateness_of_all_.record(late);
			run(timer);
		}
		return waiting_.top().due;
	}

	// Forgets what was measured so far.
	void restartMeasuring() {
		for (Histogram& lateness : lateness_) {
			lateness = Histogram();
		}
		lateness_of_all_ = Histogram();
	}

	const Histogram& lateness(TimerKind kind) const { return lateness_[static_cast<std::size_t>(kind)]; }
	const Histogram& latenessOfAll() const { return lateness_of_all_; }

private:
	struct Later {
		bool operator()(const Timer& a, const Timer& b) const { return a.due > b.due; }
	};

	const GameClock& clock_;
	std::priority_queue<Timer, std::vector<Timer>, Later> waiting_;
	std::array<Histogram, TIMER_KINDS> lateness_;
	Histogram lateness_of_all_;
};

} // namespace sample
