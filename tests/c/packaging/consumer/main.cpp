// Started with the version that is expected; prints the version that answers. Its status tells what is wrong.

#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "common/p2p_data_sync.hpp"

std::size_t runTimers();

int main(int argc, char** argv) {
	if (argc != 2 || std::strcmp(argv[1], p2p_sync_version()) != 0) {
		std::fprintf(stderr, "the library is of version %s\n", p2p_sync_version());
		return 1;
	}
	if (p2p_sync_abi_version() != P2P_SYNC_ABI_VERSION) {
		std::fprintf(stderr, "the library's ABI is %u, the header's %d\n", p2p_sync_abi_version(), P2P_SYNC_ABI_VERSION);
		return 2;
	}

	auto& sync = rathena::P2PDataSync::getInstance();
	const bool has_started = sync.init("a-folder-that-is-not-there/p2p_data_sync.conf");
	const rathena::SyncError error = rathena::P2PDataSync::lastError();
	if (has_started || error.code != P2P_SYNC_ERR_CONFIG_UNREADABLE) {
		std::fprintf(stderr, "without a configuration the start gives %d: %s\n", error.code, error.message.c_str());
		return 3;
	}
	if (runTimers() != 0) {
		return 4;
	}

	// The server's own exceptions still find their way beside another language's runtime.
	try {
		throw std::runtime_error("of the server");
	} catch (const std::runtime_error&) {
		std::puts(p2p_sync_version());
		return 0;
	}
}
