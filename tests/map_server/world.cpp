#include "world.hpp"

#include <algorithm>

namespace sample {

using rathena::SyncDataType;

namespace {

constexpr std::uint32_t PLAYER_MAPS = 8;
constexpr std::uint32_t NPC_MAPS = 408;
constexpr std::uint32_t MAP_CELLS = 300;
constexpr std::uint32_t DROPS = 4096;
constexpr std::uint32_t QUESTS = 4;
constexpr std::uint32_t HP_MAX = 20443;

constexpr std::uint32_t ACCOUNTS_FROM = 2000000;
constexpr std::uint32_t CHARS_FROM = 150000;
constexpr std::uint32_t MONSTERS_FROM = 110100000;
constexpr std::uint32_t NPCS_FROM = 110000000;

// A second, on a server of 10,000 events a second.
constexpr double PLAYER_STEPS = 3.6;
constexpr double MONSTER_STEPS = 0.67;
constexpr double CHATS = 55;
constexpr double DROPPED = 60;
constexpr double NPC_EVENTS = 50;
constexpr double QUEST_STEPS = 20;
constexpr double SAVES = 10;
constexpr double USER_COUNTS = 8;
constexpr double HITS = 450;

} // namespace

World::World(const Options& options, Feed& feed, Timers& timers, const Spin& spin)
	: options_(options), feed_(feed), timers_(timers), spin_(spin), scale_(options.events / 10000.0),
	  players_(options.players), monsters_(options.monsters), users_(PLAYER_MAPS),
	  last_position_(std::size_t{options.players} * PLAYER_MAPS), last_monster_(options.monsters),
	  last_npc_(options.burst), last_drop_(DROPS), last_quest_(std::size_t{options.players} * QUESTS),
	  last_player_(options.players), last_map_(PLAYER_MAPS) {
	maps_ = {"prontera", "geffen", "payon", "morocc", "prt_fild05", "gef_fild07", "pay_fild01", "moc_fild01"};
	for (std::uint32_t map = 0; map < NPC_MAPS; ++map) {
		std::snprintf(buffer_, sizeof(buffer_), "in_town_%03u", map);
		maps_.push_back(buffer_);
	}
	json_.reserve(sizeof(buffer_));
}

void World::start(Nanoseconds now) {
	for (std::uint32_t at = 0; at < options_.players; ++at) {
		players_[at] = {at % PLAYER_MAPS, random(MAP_CELLS), random(MAP_CELLS), HP_MAX, 0};
		++users_[at % PLAYER_MAPS];
		GameEvent came = event(Call::ENTER_MAP, SyncDataType::PLAYER_PRESENCE, maps_[players_[at].map], nullptr, R"({"n":%u})");
		came.account_id = ACCOUNTS_FROM + at;
		came.char_id = came.entity = CHARS_FROM + at;
		happen(came);
		timers_.add(now + nextStep(PLAYER_STEPS), TimerKind::PLAYER_WALK, at);
	}
	for (std::uint32_t at = 0; at < options_.monsters; ++at) {
		monsters_[at] = {random(MAP_CELLS), random(MAP_CELLS), 1000, false};
		timers_.add(now + nextStep(MONSTER_STEPS), TimerKind::MONSTER_WALK, at);
	}
	for (const TimerKind kind : {TimerKind::MOB_AI, TimerKind::NATURAL_HEAL, TimerKind::AUTOSAVE, TimerKind::DRAIN,
			 TimerKind::START_NPC, TimerKind::CHAT, TimerKind::DROP, TimerKind::PICK_UP, TimerKind::NPC_EVENT,
			 TimerKind::QUEST, TimerKind::HIT, TimerKind::MAP_USERS, TimerKind::MAP_CHANGE}) {
		timers_.add(now, kind);
	}
}

void World::run(const Timer& timer) {
	Nanoseconds interval = 0;
	switch (timer.kind) {
	case TimerKind::MOB_AI:
		monstersThink();
		interval = 100 * MILLISECOND;
		break;
	case TimerKind::NATURAL_HEAL:
		playersHeal();
		interval = 500 * MILLISECOND;
		break;
	case TimerKind::AUTOSAVE:
		savePlayer();
		interval = every(SAVES);
		break;
	case TimerKind::DRAIN:
		feed_.drain();
		interval = 20 * MILLISECOND;
		break;
	case TimerKind::PLAYER_WALK:
		playerMoves(timer.subject, "move");
		interval = nextStep(PLAYER_STEPS);
		break;
	case TimerKind::MONSTER_WALK:
		monsterMoves(timer.subject, "move");
		interval = nextStep(MONSTER_STEPS);
		break;
	case TimerKind::START_NPC:
		startNpcs();
		if (npcs_started_ == options_.burst) {
			return;
		}
		interval = 20 * MILLISECOND;
		break;
	case TimerKind::CHAT:
		chat();
		interval = every(CHATS);
		break;
	case TimerKind::DROP:
		drop();
		interval = every(DROPPED);
		break;
	case TimerKind::PICK_UP:
		pickUp();
		interval = every(DROPPED);
		break;
	case TimerKind::NPC_EVENT:
		if (npcs_started_ > 0) {
			npcEvent(random(npcs_started_), "event");
		}
		interval = every(NPC_EVENTS);
		break;
	case TimerKind::QUEST:
		quest();
		interval = every(QUEST_STEPS);
		break;
	case TimerKind::HIT:
		monsterMoves(random(options_.monsters), "hp");
		interval = every(HITS);
		break;
	case TimerKind::MAP_USERS:
		countUsers();
		interval = every(USER_COUNTS);
		break;
	case TimerKind::MAP_CHANGE:
		if (options_.map_changes <= 0) {
			return;
		}
		changeMap();
		interval = static_cast<Nanoseconds>(SECOND / options_.map_changes);
		break;
	case TimerKind::COUNT:
		return;
	}
	timers_.add(timer.due + interval, timer.kind, timer.subject);
}

void World::writePaths(std::FILE* file) const {
	const auto line = [file](const LastTaken& last, const std::string& path) {
		if (last.serial == 0) {
			return;
		}
		if (last.removed) {
			std::fprintf(file, "%s removed\n", path.c_str());
		} else {
			std::fprintf(file, "%s %u\n", path.c_str(), last.serial);
		}
	};
	for (std::uint32_t player = 0; player < options_.players; ++player) {
		const std::string char_id = std::to_string(CHARS_FROM + player);
		for (std::uint32_t map = 0; map < PLAYER_MAPS; ++map) {
			line(last_position_[player * PLAYER_MAPS + map], maps_[map] + "/PLAYER_POSITION/" + char_id);
		}
		for (std::uint32_t quest = 0; quest < QUESTS; ++quest) {
			line(last_quest_[player * QUESTS + quest],
				"@char/" + char_id + "/QUEST_PROGRESS/" + std::to_string(1000 + quest));
		}
		line(last_player_[player], "@char/" + char_id + "/PLAYER_DATA");
	}
	for (std::uint32_t monster = 0; monster < options_.monsters; ++monster) {
		line(last_monster_[monster],
			maps_[monsterMap(monster)] + "/MONSTER_DATA/" + std::to_string(MONSTERS_FROM + monster));
	}
	for (std::uint32_t npc = 0; npc < npcs_started_; ++npc) {
		line(last_npc_[npc], npcMap(npc) + "/NPC_STATE/" + std::to_string(NPCS_FROM + npc));
	}
	for (std::uint32_t drop = 0; drop < DROPS; ++drop) {
		line(last_drop_[drop], maps_[drop % PLAYER_MAPS] + "/ITEM_DROP/" + std::to_string(drop));
	}
	for (std::uint32_t map = 0; map < PLAYER_MAPS; ++map) {
		line(last_map_[map], maps_[map] + "/MAP_STATE");
	}
}

Nanoseconds World::every(double per_second) const {
	return static_cast<Nanoseconds>(SECOND / (per_second * scale_));
}

// Paths and pauses: between half and one and a half times the mean.
Nanoseconds World::nextStep(double per_second) {
	return every(per_second) / 2 + every(per_second) * random(1000) / 1000;
}

std::uint32_t World::random(std::uint32_t bound) {
	random_state_ ^= random_state_ << 13;
	random_state_ ^= random_state_ >> 7;
	random_state_ ^= random_state_ << 17;
	return static_cast<std::uint32_t>((random_state_ >> 32) * bound >> 32);
}

// The payload's last member is `n`, the event's serial.
template <typename... Values>
GameEvent World::event(Call call, SyncDataType type, const std::string& map, LastTaken* last, const char* format,
	Values... values) {
	GameEvent event;
	event.call = call;
	event.type = type;
	event.map = &map;
	event.last = last;
	event.serial = ++serial_;
	const int size = std::snprintf(buffer_, sizeof(buffer_), format, values..., event.serial);
	json_.assign(buffer_, static_cast<std::size_t>(std::clamp(size, 0, static_cast<int>(sizeof(buffer_)) - 1)));
	event.json = &json_;
	return event;
}

void World::happen(const GameEvent& event) {
	spin_();
	feed_.tell(event);
}

void World::playerMoves(std::uint32_t at, const char* how) {
	Player& player = players_[at];
	player.x = (player.x + random(3)) % MAP_CELLS;
	player.y = (player.y + random(3)) % MAP_CELLS;
	GameEvent moved = event(Call::PUT, SyncDataType::PLAYER_POSITION, maps_[player.map],
		&last_position_[at * PLAYER_MAPS + player.map],
		R"({"event":"%s","char_id":%u,"x":%u,"y":%u,"dir":%u,"hp":%u,"max_hp":%u,"sp":391,"max_sp":391,)"
		R"("base_level":99,"speed":150,"n":%u})",
		how, CHARS_FROM + at, player.x, player.y, random(8), player.hp, HP_MAX);
	moved.account_id = ACCOUNTS_FROM + at;
	happen(moved);
}

void World::monsterMoves(std::uint32_t at, const char* how) {
	Monster& monster = monsters_[at];
	monster.x = (monster.x + random(3)) % MAP_CELLS;
	monster.y = (monster.y + random(3)) % MAP_CELLS;
	monster.hp = monster.hp > 10 ? monster.hp - random(10) : 1000;
	happen(event(Call::PUT, SyncDataType::MONSTER_DATA, maps_[monsterMap(at)], &last_monster_[at],
		R"({"event":"%s","monster_id":%u,"mob_id":%u,"x":%u,"y":%u,"hp":%u,"max_hp":1000,"speed":200,"n":%u})", how,
		MONSTERS_FROM + at, 1000 + at % 1000, monster.x, monster.y, monster.hp));
}

// Every monster looks for someone near.
void World::monstersThink() {
	for (std::uint32_t at = 0; at < options_.monsters; ++at) {
		const Player& near = players_[at % options_.players];
		Monster& monster = monsters_[at];
		const std::uint32_t x = near.x > monster.x ? near.x - monster.x : monster.x - near.x;
		const std::uint32_t y = near.y > monster.y ? near.y - monster.y : monster.y - near.y;
		monster.is_active = near.map == monsterMap(at) && x < 14 && y < 14;
	}
}

void World::playersHeal() {
	for (Player& player : players_) {
		player.hp = std::min(player.hp + 100, HP_MAX);
	}
}

void World::savePlayer() {
	const std::uint32_t at = next_saved_++ % options_.players;
	GameEvent saved = event(Call::PUT_AND_HEAR, SyncDataType::PLAYER_DATA, maps_[players_[at].map], &last_player_[at],
		R"({"char_id":%u,"name":"player%04u","base_level":99,"job_level":50,"zeny":%u,"hp":%u,"max_hp":%u,"sp":391,)"
		R"("max_sp":391,"n":%u})",
		CHARS_FROM + at, at, random(1000000), players_[at].hp, HP_MAX);
	saved.account_id = ACCOUNTS_FROM + at;
	happen(saved);
}

void World::startNpcs() {
	const double turns = std::max(1.0, options_.burst_seconds * 50);
	const auto in_this_turn = static_cast<std::uint32_t>(options_.burst / turns) + 1;
	for (std::uint32_t more = 0; more < in_this_turn && npcs_started_ < options_.burst; ++more) {
		npcEvent(npcs_started_++, "state");
	}
}

void World::npcEvent(std::uint32_t npc, const char* how) {
	happen(event(Call::PUT, SyncDataType::NPC_STATE, npcMap(npc), &last_npc_[npc],
		R"({"event":"%s","npc_id":%u,"x":%u,"y":%u,"class":%u,"name":"Guard#%u","n":%u})", how, NPCS_FROM + npc,
		npc % MAP_CELLS, npc / MAP_CELLS, 700 + npc % 300, npc));
}

void World::chat() {
	const std::uint32_t at = random(options_.players);
	char name[16];
	std::snprintf(name, sizeof(name), "player%04u", at % 10000);
	GameEvent said = event(Call::PUT, SyncDataType::CHAT_MESSAGE, maps_[players_[at].map], nullptr,
		R"({"char_id":%u,"name":%s,"text":"does anybody sell a good shield? I am at %u,%u","n":%u})", CHARS_FROM + at,
		feed_.quoted(name).c_str(), players_[at].x, players_[at].y);
	said.account_id = ACCOUNTS_FROM + at;
	happen(said);
}

void World::drop() {
	const std::uint32_t drop = next_drop_++ % DROPS;
	happen(event(Call::PUT, SyncDataType::ITEM_DROP, maps_[drop % PLAYER_MAPS], &last_drop_[drop],
		R"({"event":"drop","drop_id":%u,"item_id":%u,"amount":%u,"x":%u,"y":%u,"n":%u})", drop, 501 + random(500),
		1 + random(10), random(MAP_CELLS), random(MAP_CELLS)));
}

void World::pickUp() {
	// Some lie for a while.
	if (next_pick_up_ + 100 > next_drop_) {
		return;
	}
	const std::uint32_t drop = next_pick_up_++ % DROPS;
	GameEvent picked = event(Call::REMOVE, SyncDataType::ITEM_DROP, maps_[drop % PLAYER_MAPS], &last_drop_[drop],
		R"({"n":%u})");
	picked.entity = drop;
	happen(picked);
}

void World::quest() {
	const std::uint32_t at = random(options_.players), quest = random(QUESTS);
	GameEvent advanced = event(Call::PUT, SyncDataType::QUEST_PROGRESS, maps_[players_[at].map],
		&last_quest_[at * QUESTS + quest], R"({"char_id":%u,"quest_id":%u,"state":%u,"counts":[%u,%u],"n":%u})",
		CHARS_FROM + at, 1000 + quest, ++players_[at].quest_state % 3, random(10), random(10));
	advanced.account_id = ACCOUNTS_FROM + at;
	happen(advanced);
}

void World::countUsers() {
	const std::uint32_t map = next_counted_++ % PLAYER_MAPS;
	happen(event(Call::PUT, SyncDataType::MAP_STATE, maps_[map], &last_map_[map],
		R"({"map_name":"%s","users":%u,"npcs":10,"width":400,"height":400,"is_vps_hosted":false,"n":%u})",
		maps_[map].c_str(), users_[map]));
}

// The one place where the game waits for the hub, so that a player is never on two maps.
void World::changeMap() {
	const std::uint32_t at = random(options_.players);
	Player& player = players_[at];
	const std::uint32_t from = player.map, to = (from + 1 + random(PLAYER_MAPS - 1)) % PLAYER_MAPS;
	const auto of_player = [at](GameEvent happened) {
		happened.account_id = ACCOUNTS_FROM + at;
		happened.char_id = happened.entity = CHARS_FROM + at;
		return happened;
	};
	happen(of_player(event(Call::LEAVE_MAP, SyncDataType::PLAYER_PRESENCE, maps_[from], nullptr, R"({"n":%u})")));
	happen(of_player(event(Call::REMOVE, SyncDataType::PLAYER_POSITION, maps_[from],
		&last_position_[at * PLAYER_MAPS + from], R"({"n":%u})")));
	spin_();
	feed_.tellAndWait(of_player(event(Call::PUT, SyncDataType::CRITICAL_GAME_STATE, maps_[to], nullptr,
		R"({"event":"map_change","char_id":%u,"from":"%s","to":"%s","base_level":99,"hp":%u,"n":%u})", CHARS_FROM + at,
		maps_[from].c_str(), maps_[to].c_str(), player.hp)));
	--users_[from];
	++users_[to];
	player.map = to;
	happen(of_player(event(Call::ENTER_MAP, SyncDataType::PLAYER_PRESENCE, maps_[to], nullptr, R"({"n":%u})")));
	playerMoves(at, "enter");
}

std::uint32_t World::monsterMap(std::uint32_t monster) const {
	return monster % PLAYER_MAPS;
}

const std::string& World::npcMap(std::uint32_t npc) const {
	return maps_[npc % maps_.size()];
}

} // namespace sample
