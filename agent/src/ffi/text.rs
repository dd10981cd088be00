//! Texts and structs that cross the boundary: how they are read from C's memory and written to it.

use std::{ffi::c_char, mem::MaybeUninit, ptr::null};

use p2p_sync_proto::{Code, Problem};

/// Bytes that are read during the call and not kept; not NUL-terminated. The texts of operations and what
/// `p2p_sync_json_string` takes are in the server's code page (`text_encoding`); all others are UTF-8, or refused with
/// BAD_TEXT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct p2p_sync_text {
    /// May be null if `size` is 0.
    pub data: *const c_char,
    /// Bytes.
    pub size: usize,
}

impl p2p_sync_text {
    /// Borrows a Rust text for a callback.
    pub(super) fn of(text: &str) -> Self {
        Self {
            data: text.as_ptr().cast(),
            size: text.len(),
        }
    }

    pub(super) const EMPTY: Self = Self { data: null(), size: 0 };

    /// # Safety
    /// `data` points to `size` bytes that stay as they are for `'a`, or is null.
    pub(super) unsafe fn bytes<'a>(self, what: &str) -> Result<&'a [u8], Problem> {
        if self.size == 0 {
            return Ok(&[]);
        }
        if self.data.is_null() {
            return Err(null_argument(what));
        }
        if self.size > isize::MAX as usize {
            return Err(bad_argument(&format!("{what} has an impossible size")));
        }
        // SAFETY: not null, and by the caller's word `size` readable bytes.
        Ok(unsafe { std::slice::from_raw_parts(self.data.cast(), self.size) })
    }

    /// # Safety
    /// As [`Self::bytes`].
    pub(super) unsafe fn utf8<'a>(self, what: &str) -> Result<&'a str, Problem> {
        // SAFETY: the caller's word.
        let bytes = unsafe { self.bytes(what) }?;
        std::str::from_utf8(bytes).map_err(|_| {
            Problem::new(
                Code::BadText,
                format!("{what} is not UTF-8: convert it before the call"),
            )
        })
    }
}

/// Writes a text and a NUL into the caller's buffer; `size` is given its length without the NUL, fitting or not.
///
/// `BUFFER_TOO_SMALL` leaves the buffer as it is; a null buffer of capacity 0 asks for the size.
///
/// # Safety
/// `buffer` has `capacity` writable bytes, or is null; `size` is writable, or null.
pub(super) unsafe fn put_text(
    text: &str,
    buffer: *mut c_char,
    capacity: usize,
    size: *mut usize,
) -> Result<(), Problem> {
    if !size.is_null() {
        // SAFETY: not null, and the caller's to be written.
        unsafe { size.write_unaligned(text.len()) };
    }
    if buffer.is_null() && capacity > 0 {
        return Err(null_argument("buffer"));
    }
    if capacity <= text.len() {
        let sentence = format!("{} bytes are needed, the buffer has {capacity}", text.len() + 1);
        return Err(Problem::new(Code::BufferTooSmall, sentence));
    }
    // SAFETY: `capacity` bytes are writable by the caller's word, and one more than the text's length is not above it.
    unsafe {
        buffer.cast::<u8>().copy_from_nonoverlapping(text.as_ptr(), text.len());
        buffer.add(text.len()).write(0);
    }
    Ok(())
}

/// A struct of the ABI that may grow: its first field is its size as the caller was compiled with.
///
/// # Safety
/// `#[repr(C)]`, the first field is `struct_size: usize`, and all bytes zero are a valid value.
pub(super) unsafe trait Versioned: Copy {
    /// Of its first version.
    const BYTES_MIN: usize;
}

/// Larger structs are none of ours.
const STRUCT_BYTES_MAX: usize = 4096;

/// Reads a caller's struct: fields it does not have yet are zero; fields we do not have yet have to be.
///
/// # Safety
/// `from` is null, or points to as many readable bytes as its first field says.
pub(super) unsafe fn read_struct<T: Versioned>(from: *const T, what: &str) -> Result<T, Problem> {
    const { assert!(T::BYTES_MIN <= size_of::<T>()) };
    // SAFETY: passed on.
    let size = unsafe { struct_size(from, what) }?;
    let mut value = MaybeUninit::<T>::zeroed();
    let known = size.min(size_of::<T>());
    // SAFETY: `known` bytes are readable and fit; what is not copied is zero, which is valid.
    let value = unsafe {
        value
            .as_mut_ptr()
            .cast::<u8>()
            .copy_from_nonoverlapping(from.cast(), known);
        value.assume_init()
    };
    // SAFETY: the bytes up to `size` are readable.
    let unknown = unsafe { std::slice::from_raw_parts(from.cast::<u8>().add(known), size - known) };
    if unknown.iter().any(|byte| *byte != 0) {
        let sentence = format!("{what} sets fields that this library does not know: link the library of your header");
        return Err(Problem::new(Code::BadStructSize, sentence));
    }
    Ok(value)
}

/// Writes as much of a struct as the caller's has room for; its `struct_size` stays the caller's.
///
/// # Safety
/// `to` is null, or points to as many writable bytes as its first field says.
pub(super) unsafe fn write_struct<T: Versioned>(value: &T, to: *mut T, what: &str) -> Result<(), Problem> {
    const { assert!(T::BYTES_MIN <= size_of::<T>()) };
    // SAFETY: passed on.
    let size = unsafe { struct_size(to, what) }?;
    let known = size.min(size_of::<T>()) - size_of::<usize>();
    // SAFETY: `known` bytes after the first field are writable there and readable here.
    unsafe {
        to.cast::<u8>()
            .add(size_of::<usize>())
            .copy_from_nonoverlapping(std::ptr::from_ref(value).cast::<u8>().add(size_of::<usize>()), known);
    }
    Ok(())
}

/// Refuses what [`write_struct`] would, before the call does anything.
///
/// # Safety
/// `at` is null, or points to a readable first field.
pub(super) unsafe fn struct_size<T: Versioned>(at: *const T, what: &str) -> Result<usize, Problem> {
    if at.is_null() {
        return Err(null_argument(what));
    }
    if !at.is_aligned() {
        return Err(bad_argument(&format!("{what} is not aligned as a struct has to be")));
    }
    // SAFETY: not null, aligned, and the first field is readable by the caller's word.
    let size = unsafe { at.cast::<usize>().read() };
    if (T::BYTES_MIN..=STRUCT_BYTES_MAX).contains(&size) {
        return Ok(size);
    }
    let sentence = format!("{what}.struct_size is {size}: set it to sizeof the struct before the call");
    Err(Problem::new(Code::BadStructSize, sentence))
}

pub(super) fn null_argument(what: &str) -> Problem {
    Problem::new(Code::NullArgument, format!("{what} is null: pass a pointer to it"))
}

pub(super) fn bad_argument(sentence: &str) -> Problem {
    Problem::new(Code::BadArgument, sentence)
}
