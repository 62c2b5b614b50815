//! Memory for large pictures. Touching fresh memory in pages of 4 KiB costs as much as a third of decoding a photo.

/// Bytes from which it pays.
#[cfg(target_os = "linux")]
const LARGE: usize = 8 << 20;

/// `len` zeros, in huge pages where the system offers them.
pub(crate) fn zeroed(len: usize) -> Vec<u8> {
    // For a request of this size the allocator gets zeroed pages from the system and does not touch them.
    let memory = vec![0u8; len];
    #[cfg(target_os = "linux")]
    if len >= LARGE {
        const PAGE: usize = 4096;
        let skip = memory.as_ptr().align_offset(PAGE);
        let whole = (len - skip) / PAGE * PAGE;
        // SAFETY: the range is inside of `memory`; the advice changes how it is backed, not what it holds.
        unsafe { libc::madvise(memory.as_ptr().add(skip).cast_mut().cast(), whole, libc::MADV_HUGEPAGE) };
    }
    memory
}
