#include "report.hpp"

namespace sample {

void Report::add(const std::string& name, double value) {
	groups_.back().rows.push_back({name, {{std::string(), value}}, true});
}

void Report::add(const std::string& name, const Histogram& times) {
	const auto microseconds = [](std::uint64_t nanoseconds) { return static_cast<double>(nanoseconds) / 1000.0; };
	groups_.back().rows.push_back({name,
		{
			{"count", static_cast<double>(times.count())},
			{"mean_us", times.mean() / 1000.0},
			{"p50_us", microseconds(times.quantile(0.5))},
			{"p99_us", microseconds(times.quantile(0.99))},
			{"p999_us", microseconds(times.quantile(0.999))},
			{"max_us", microseconds(times.max())},
		},
		false});
}

void Report::add(const std::string& name, const ProcessFigures& figures) {
	groups_.back().rows.push_back({name,
		{
			{"resident_kib", static_cast<double>(figures.resident)},
			{"anonymous_kib", static_cast<double>(figures.anonymous)},
			{"resident_peak_kib", static_cast<double>(figures.resident_peak)},
			{"descriptors", static_cast<double>(figures.descriptors)},
			{"threads", static_cast<double>(figures.threads)},
		},
		false});
}

void Report::print(std::FILE* file) const {
	for (const Group& group : groups_) {
		const Figures* columns = nullptr;
		for (const Row& row : group.rows) {
			if (row.is_single) {
				std::fprintf(file, "%-12s %-22s %12.6g\n", group.name.c_str(), row.name.c_str(), row.figures[0].second);
				continue;
			}
			if (columns == nullptr || columns->size() != row.figures.size()) {
				columns = &row.figures;
				std::fprintf(file, "%-35s", group.name.c_str());
				for (const auto& [name, value] : *columns) {
					std::fprintf(file, " %17s", name.c_str());
				}
				std::fprintf(file, "\n");
			}
			std::fprintf(file, "%-12s %-22s", "", row.name.c_str());
			for (const auto& [name, value] : row.figures) {
				std::fprintf(file, " %17.10g", value);
			}
			std::fprintf(file, "\n");
		}
	}
}

void Report::writeJson(std::FILE* file) const {
	// Names are this program's own and need no escapes.
	const char* group_separator = "{";
	for (const Group& group : groups_) {
		std::fprintf(file, "%s\n  \"%s\": ", group_separator, group.name.c_str());
		group_separator = ",";
		const char* row_separator = "{";
		for (const Row& row : group.rows) {
			std::fprintf(file, "%s\n    \"%s\": ", row_separator, row.name.c_str());
			row_separator = ",";
			if (row.is_single) {
				std::fprintf(file, "%.10g", row.figures[0].second);
				continue;
			}
			const char* separator = "{";
			for (const auto& [name, value] : row.figures) {
				std::fprintf(file, "%s\"%s\": %.10g", separator, name.c_str(), value);
				separator = ", ";
			}
			std::fprintf(file, "}");
		}
		std::fprintf(file, "%s\n  }", group.rows.empty() ? "{" : "");
	}
	std::fprintf(file, "\n}\n");
}

} // namespace sample
