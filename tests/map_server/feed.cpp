#include "feed.hpp"

namespace sample {

using rathena::SyncDataType;
using rathena::SyncState;

namespace {

// What travels in the critical lane by the built-in policies.
bool isCritical(SyncDataType type) {
	switch (type) {
	case SyncDataType::MAP_STATE:
	case SyncDataType::MONSTER_DATA:
	case SyncDataType::PLAYER_POSITION:
	case SyncDataType::CRITICAL_GAME_STATE:
	case SyncDataType::SECURITY_VALIDATION:
	case SyncDataType::PLAYER_PRESENCE:
		return true;
	default:
		return false;
	}
}

} // namespace

void Feed::tell(const GameEvent& event) {
	++events;
	// Behind what waits already: events of a path keep their order.
	if (!waiting_.empty() || !call(event)) {
		keep(event);
	}
}

void Feed::tellAndWait(const GameEvent& event) {
	++events;
	const Nanoseconds began = monotonic();
	std::string id;
	if (sync_ != nullptr) {
		id = sync_->syncCriticalData(event.type, event.account_id, *event.map, *event.json);
	}
	const Nanoseconds waited = monotonic() - began;
	waiting_call.record(waited);
	clock_.stoodStill(waited);
	if (sync_ == nullptr) {
		return wasTaken(event);
	}
	if (id.empty()) {
		const p2p_sync_code code = rathena::P2PDataSync::lastError().code;
		if (code == P2P_SYNC_ERR_QUEUE_FULL) {
			++queue_full;
			return keep(event);
		}
		++refused[code];
		return;
	}
	wasTaken(event);
	switch (sync_->getSyncResult(id).state) {
	case SyncState::APPLIED: ++waited_applied; break;
	case SyncState::ACCEPTED:
	case SyncState::SPOOLED:
	case SyncState::UNKNOWN: ++waited_unknown; break;
	default: ++waited_other;
	}
}

void Feed::drain() {
	const Nanoseconds began = monotonic();
	if (sync_ != nullptr) {
		sync_->processSyncQueue();
	}
	drain_cost.record(monotonic() - began);
	while (!waiting_.empty()) {
		Waiting& oldest = waiting_.front();
		oldest.event.json = &oldest.json;
		if (!call(oldest.event)) {
			break;
		}
		waiting_.pop_front();
	}
}

std::string Feed::quoted(const std::string& text) const {
	// The names of this game are ASCII without quotes; those of a real one are not.
	return sync_ != nullptr ? sync_->jsonString(text) : '"' + text + '"';
}

void Feed::restartMeasuring() {
	for (Histogram* cost : {&enqueue_cost, &bulk_cost, &critical_cost, &empty_cost, &waiting_call, &drain_cost}) {
		*cost = Histogram();
	}
}

std::uint64_t Feed::taken() const {
	std::uint64_t sum = 0;
	for (const std::uint64_t of_type : taken_) {
		sum += of_type;
	}
	return sum;
}

// False when there is no room; another refusal is counted and the event given up.
bool Feed::call(const GameEvent& event) {
	const Nanoseconds before = monotonic();
	if (sync_ != nullptr) {
		p2p_sync_abi_version();
	}
	const Nanoseconds between = monotonic();
	const std::string id = sync_ != nullptr ? submit(event) : std::string();
	const Nanoseconds after = monotonic();
	empty_cost.record(between - before);
	enqueue_cost.record(after - between);
	(isCritical(event.type) ? critical_cost : bulk_cost).record(after - between);
	if (sync_ == nullptr || !id.empty()) {
		wasTaken(event);
		return true;
	}
	const p2p_sync_code code = rathena::P2PDataSync::lastError().code;
	if (code == P2P_SYNC_ERR_QUEUE_FULL) {
		++queue_full;
		return false;
	}
	++refused[code];
	return true;
}

std::string Feed::submit(const GameEvent& event) {
	switch (event.call) {
	case Call::PUT:
		return sync_->syncToMainServer(event.type, event.account_id, *event.map, *event.json);
	case Call::PUT_AND_HEAR: {
		rathena::SyncOperation operation;
		operation.type = event.type;
		operation.account_id = event.account_id;
		operation.map = *event.map;
		operation.json = *event.json;
		return sync_->syncToMainServer(operation, [this](const rathena::SyncResult&) { ++callbacks; });
	}
	case Call::REMOVE:
		return sync_->removeFromMainServer(event.type, event.account_id, *event.map, std::to_string(event.entity));
	case Call::ENTER_MAP:
		return sync_->enterMap(event.account_id, event.char_id, *event.map);
	case Call::LEAVE_MAP:
		return sync_->leaveMap(event.account_id, event.char_id, *event.map);
	}
	return std::string();
}

void Feed::keep(const GameEvent& event) {
	waiting_.push_back({event, event.json == nullptr ? std::string() : *event.json});
	waiting_for_room_max = waiting_.size() > waiting_for_room_max ? waiting_.size() : waiting_for_room_max;
}

void Feed::wasTaken(const GameEvent& event) {
	++taken_[static_cast<std::size_t>(event.type)];
	if (event.last != nullptr) {
		event.last->serial = event.serial;
		event.last->removed = event.call == Call::REMOVE;
	}
}

} // namespace sample
