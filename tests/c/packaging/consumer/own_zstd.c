// Names that the library has inside as well, as a server has them that links its own: they neither clash when it is
// linked nor answer the library's calls.

#include <stdlib.h>

#include "p2p_sync.h"

#define OF_THE_SERVER(name) \
	void name(void); \
	void name(void) { abort(); }

OF_THE_SERVER(ZSTD_compressStream2)
OF_THE_SERVER(ZSTD_createCCtx)
OF_THE_SERVER(ZSTD_createDCtx)
OF_THE_SERVER(ZSTD_decompressStream)
OF_THE_SERVER(ZSTD_versionNumber)
OF_THE_SERVER(__rust_alloc)
OF_THE_SERVER(rust_begin_unwind)
OF_THE_SERVER(rust_eh_personality)
