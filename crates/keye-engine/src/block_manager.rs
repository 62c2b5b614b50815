//! Blocks of the KV cache: free list, reference counts, prefix sharing.
