#include "options.hpp"

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>

namespace sample {

namespace {

const char USAGE[] =
	"sample_map_server --config FILE [--seconds 60] [--warmup 6] [--events 10000] [--players 900] [--monsters 9000]\n"
	"                  [--burst 20000] [--burst-seconds 3] [--map-changes 5] [--packets 0] [--share 0.33] [--spin N]\n"
	"                  [--core N] [--flush-ms 60000] [--json FILE] [--ledger FILE] [--without]\n"
	"sample_map_server --calibrate [--events 10000] [--share 0.33] [--core N]\n"
	"sample_map_server --drain --config FILE [--flush-ms 60000] [--json FILE]\n"
	"sample_map_server --queued 10000 --config FILE [--json FILE]\n";

[[noreturn]] void refuse(const std::string& sentence) {
	std::fprintf(stderr, "sample_map_server: %s\n%s", sentence.c_str(), USAGE);
	std::exit(2);
}

double number(const std::string& name, const std::string& text) {
	char* end = nullptr;
	const double value = std::strtod(text.c_str(), &end);
	if (text.empty() || *end != '\0' || !(value >= 0 && value <= 1e9)) {
		refuse(name + " takes a number, not '" + text + "'");
	}
	return value;
}

} // namespace

Options parseOptions(int argc, char** argv) {
	Options options;
	const auto real = [](double& into) {
		return [&into](const std::string& name, const std::string& text) { into = number(name, text); };
	};
	const auto whole = [](auto& into) {
		return [&into](const std::string& name, const std::string& text) {
			into = static_cast<std::remove_reference_t<decltype(into)>>(number(name, text));
		};
	};
	const auto text = [](std::string& into) {
		return [&into](const std::string&, const std::string& given) { into = given; };
	};
	const std::map<std::string, std::function<void(const std::string&, const std::string&)>> valued{
		{"--config", text(options.config)},
		{"--json", text(options.json)},
		{"--ledger", text(options.ledger)},
		{"--seconds", real(options.seconds)},
		{"--warmup", real(options.warmup)},
		{"--events", real(options.events)},
		{"--players", whole(options.players)},
		{"--monsters", whole(options.monsters)},
		{"--burst", whole(options.burst)},
		{"--burst-seconds", real(options.burst_seconds)},
		{"--map-changes", real(options.map_changes)},
		{"--packets", real(options.packets)},
		{"--share", real(options.share)},
		{"--spin", whole(options.spin)},
		{"--core", whole(options.core)},
		{"--flush-ms", whole(options.flush_ms)},
		{"--queued", whole(options.queued)},
	};
	const std::map<std::string, bool*> switches{
		{"--without", &options.without},
		{"--calibrate", &options.calibrate},
		{"--drain", &options.drain},
	};
	for (int at = 1; at < argc; ++at) {
		const std::string name = argv[at];
		if (const auto found = switches.find(name); found != switches.end()) {
			*found->second = true;
		} else if (const auto taking = valued.find(name); taking != valued.end()) {
			if (++at == argc) {
				refuse(name + " takes a value");
			}
			taking->second(name, argv[at]);
		} else {
			refuse("there is no option " + name);
		}
	}
	if (options.config.empty() && !options.without && !options.calibrate) {
		refuse("--config is needed");
	}
	if (options.players == 0 || options.monsters == 0 || options.events <= 0) {
		refuse("a world has players, monsters and events");
	}
	return options;
}

} // namespace sample
