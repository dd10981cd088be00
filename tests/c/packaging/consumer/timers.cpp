// A second file that includes the header, by its other name.

#include <p2p_data_sync.hpp>
#include <p2p_sync.h>

std::size_t runTimers();

std::size_t runTimers() {
	return rathena::P2PDataSync::getInstance().processSyncQueue();
}
