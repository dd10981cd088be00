// How long things took: a histogram of nanoseconds that allocates nothing while it records.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sample {

// Values to 2^42 ns (over an hour), each within 0.1 %.
class Histogram {
public:
	Histogram() : counts_(BUCKETS, 0) {}

	void record(std::int64_t nanoseconds) {
		const std::uint64_t value = nanoseconds < 0 ? 0 : static_cast<std::uint64_t>(nanoseconds);
		++counts_[bucket(value)];
		++total_;
		sum_ += value;
		max_ = value > max_ ? value : max_;
	}

	std::uint64_t count() const { return total_; }
	std::uint64_t max() const { return max_; }
	double mean() const { return total_ == 0 ? 0.0 : static_cast<double>(sum_) / static_cast<double>(total_); }

	// The value that a share of all values does not exceed; 0 without any.
	std::uint64_t quantile(double share) const {
		const double wanted = share * static_cast<double>(total_);
		std::uint64_t seen = 0;
		for (std::size_t at = 0; at < counts_.size(); ++at) {
			seen += counts_[at];
			if (seen > 0 && static_cast<double>(seen) >= wanted) {
				const std::uint64_t upper = upperBound(at);
				return upper < max_ ? upper : max_;
			}
		}
		return max_;
	}

private:
	// Below 2^11 each value has a bucket of its own; above, each power of two has 2^10.
	static constexpr unsigned EXACT_BITS = 11;
	static constexpr unsigned LARGEST_BITS = 42;
	static constexpr std::size_t STEPS = std::size_t{1} << (EXACT_BITS - 1);
	static constexpr std::size_t BUCKETS = STEPS * (LARGEST_BITS - EXACT_BITS + 2);

	static std::size_t bucket(std::uint64_t value) {
		if (value >> EXACT_BITS == 0) {
			return static_cast<std::size_t>(value);
		}
		if (value >> LARGEST_BITS != 0) {
			return BUCKETS - 1;
		}
		const unsigned bits = 64 - static_cast<unsigned>(__builtin_clzll(value));
		const unsigned shift = bits - EXACT_BITS;
		return STEPS * shift + static_cast<std::size_t>(value >> shift);
	}

	static std::uint64_t upperBound(std::size_t at) {
		if (at < 2 * STEPS) {
			return at;
		}
		const std::size_t shift = at / STEPS - 1;
		return ((static_cast<std::uint64_t>(at - STEPS * shift) + 1) << shift) - 1;
	}

	std::vector<std::uint64_t> counts_;
	std::uint64_t total_ = 0;
	std::uint64_t sum_ = 0;
	std::uint64_t max_ = 0;
};

} // namespace sample
