// What a run came to: a table for people, JSON for programs.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "histogram.hpp"
#include "process_figures.hpp"

namespace sample {

// Figures in the order they are added, in named groups.
class Report {
public:
	void group(std::string name) { groups_.push_back({std::move(name), {}}); }
	void add(const std::string& name, double value);
	void add(const std::string& name, std::uint64_t value) { add(name, static_cast<double>(value)); }
	// Count, mean, p50, p99, p99.9 and maximum, in microseconds.
	void add(const std::string& name, const Histogram& times);
	void add(const std::string& name, const ProcessFigures& figures);

	void print(std::FILE* file) const;
	void writeJson(std::FILE* file) const;

private:
	using Figures = std::vector<std::pair<std::string, double>>;
	struct Row {
		std::string name;
		Figures figures;
		// A row of one figure without a name of its own.
		bool is_single;
	};
	struct Group {
		std::string name;
		std::vector<Row> rows;
	};

	std::vector<Group> groups_;
};

} // namespace sample
