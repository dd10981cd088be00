// What ThreadSanitizer has to know of Rust's standard library, which comes compiled without it: where a lock's slow
// path, a condition variable, parking or a first use has waited for another thread. Without this each of them looks like
// a race on what it protects.
//
// The linker puts these in front of the functions of their names (`--wrap`); tests/c/run looks up how the names are
// mangled by the toolchain, and passes that as a macro. The functions are Rust's own, called with plain pointers and
// numbers, which travel as C's do.
#include <stdbool.h>
#include <stdint.h>

void __tsan_acquire(void *address);
void __tsan_release(void *address);

#define JOINED(a, b) a##b
#define WRAP(name) JOINED(__wrap_, name)
#define REAL(name) JOINED(__real_, name)

// Who unparks a thread has written to one word of its block.
enum { THREAD_WORDS = 24 };

// Which word of several is the one that was written to is the library's own affair.
static void acquire_words(char *words, int count) {
	for (int word = 0; word < count; ++word) {
		__tsan_acquire(words + 4 * word);
	}
}

#ifdef MUTEX_LOCK_CONTENDED
void REAL(MUTEX_LOCK_CONTENDED)(char *mutex);
void WRAP(MUTEX_LOCK_CONTENDED)(char *mutex) {
	REAL(MUTEX_LOCK_CONTENDED)(mutex);
	acquire_words(mutex, 1);
}
#endif

#ifdef RWLOCK_READ_CONTENDED
void REAL(RWLOCK_READ_CONTENDED)(char *lock);
void WRAP(RWLOCK_READ_CONTENDED)(char *lock) {
	REAL(RWLOCK_READ_CONTENDED)(lock);
	acquire_words(lock, 2);
}
#endif

#ifdef RWLOCK_WRITE_CONTENDED
void REAL(RWLOCK_WRITE_CONTENDED)(char *lock);
void WRAP(RWLOCK_WRITE_CONTENDED)(char *lock) {
	REAL(RWLOCK_WRITE_CONTENDED)(lock);
	acquire_words(lock, 2);
}
#endif

#ifdef CONDVAR_WAIT
void REAL(CONDVAR_WAIT)(void *condvar, void *mutex);
void WRAP(CONDVAR_WAIT)(void *condvar, void *mutex) {
	__tsan_release(mutex);
	REAL(CONDVAR_WAIT)(condvar, mutex);
	__tsan_acquire(mutex);
}
#endif

#ifdef CONDVAR_WAIT_TIMEOUT
bool REAL(CONDVAR_WAIT_TIMEOUT)(void *condvar, void *mutex, uint64_t seconds, uint32_t nanoseconds);
bool WRAP(CONDVAR_WAIT_TIMEOUT)(void *condvar, void *mutex, uint64_t seconds, uint32_t nanoseconds) {
	__tsan_release(mutex);
	const bool in_time = REAL(CONDVAR_WAIT_TIMEOUT)(condvar, mutex, seconds, nanoseconds);
	__tsan_acquire(mutex);
	return in_time;
}
#endif

#ifdef THREAD_PARK
void REAL(THREAD_PARK)(char **handle);
void WRAP(THREAD_PARK)(char **handle) {
	REAL(THREAD_PARK)(handle);
	acquire_words(*handle, THREAD_WORDS);
}
#endif

#ifdef THREAD_PARK_TIMEOUT
void REAL(THREAD_PARK_TIMEOUT)(char **handle, uint64_t seconds, uint32_t nanoseconds);
void WRAP(THREAD_PARK_TIMEOUT)(char **handle, uint64_t seconds, uint32_t nanoseconds) {
	REAL(THREAD_PARK_TIMEOUT)(handle, seconds, nanoseconds);
	acquire_words(*handle, THREAD_WORDS);
}
#endif

#ifdef ONCE_CALL
void REAL(ONCE_CALL)(void *once, bool ignores_poison, void *closure, void *vtable, void *location);
void WRAP(ONCE_CALL)(void *once, bool ignores_poison, void *closure, void *vtable, void *location) {
	REAL(ONCE_CALL)(once, ignores_poison, closure, vtable, location);
	__tsan_release(once);
	__tsan_acquire(once);
}
#endif
