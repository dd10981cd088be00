#include "timers.hpp"

namespace sample {

const char* timerName(TimerKind kind) {
	switch (kind) {
	case TimerKind::MOB_AI: return "mob_ai_100ms";
	case TimerKind::NATURAL_HEAL: return "natural_heal_500ms";
	case TimerKind::AUTOSAVE: return "autosave";
	case TimerKind::DRAIN: return "drain_20ms";
	case TimerKind::PLAYER_WALK: return "player_walk";
	case TimerKind::MONSTER_WALK: return "monster_walk";
	case TimerKind::START_NPC: return "start_npc";
	case TimerKind::CHAT: return "chat";
	case TimerKind::DROP: return "drop";
	case TimerKind::PICK_UP: return "pick_up";
	case TimerKind::NPC_EVENT: return "npc_event";
	case TimerKind::QUEST: return "quest";
	case TimerKind::HIT: return "hit";
	case TimerKind::MAP_USERS: return "map_users";
	case TimerKind::MAP_CHANGE: return "map_change";
	case TimerKind::COUNT: break;
	}
	return "";
}

} // namespace sample
