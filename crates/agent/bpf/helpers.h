/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The kernel's helpers by number (uapi/linux/bpf.h, enum bpf_func_id), and clang's relocations of kernel types, as far
 * as the capture programs use them: so that clang and the kernel's own headers are all that it takes to build them.
 */
#ifndef FARSHORE_HELPERS_H
#define FARSHORE_HELPERS_H

#include <stdbool.h>
#include <linux/types.h>
#include <linux/bpf.h>

#define SEC(name) __attribute__((section(name), used))
#undef __always_inline /* the kernel's headers have a weaker one */
#define __always_inline inline __attribute__((always_inline))

/* How a map is described to the loader: through types. */
#define __uint(name, value) int(*name)[value]
#define __type(name, value) typeof(value) *name

#define HELPER(number, type, name, ...) static type (*name)(__VA_ARGS__) = (void *)(number)
HELPER(1, void *, bpf_map_lookup_elem, void *map, const void *key);
HELPER(2, long, bpf_map_update_elem, void *map, const void *key, const void *value, __u64 flags);
HELPER(3, long, bpf_map_delete_elem, void *map, const void *key);
HELPER(8, __u32, bpf_get_smp_processor_id, void);
HELPER(14, __u64, bpf_get_current_pid_tgid, void);
HELPER(35, __u64, bpf_get_current_task, void);
HELPER(113, long, bpf_probe_read_kernel, void *to, __u32 bytes, const void *from);
HELPER(125, __u64, bpf_ktime_get_boot_ns, void);
HELPER(131, void *, bpf_ringbuf_reserve, void *ring, __u64 bytes, __u64 flags);
HELPER(132, void, bpf_ringbuf_submit, void *data, __u64 flags);
HELPER(134, __u64, bpf_ringbuf_query, void *ring, __u64 flags);
HELPER(181, long, bpf_loop, __u32 times, void *callback, void *context, __u64 flags);
HELPER(198, long, bpf_ringbuf_reserve_dynptr, void *ring, __u32 bytes, __u64 flags, struct bpf_dynptr *to);
HELPER(199, void, bpf_ringbuf_submit_dynptr, struct bpf_dynptr *to, __u64 flags);
HELPER(200, void, bpf_ringbuf_discard_dynptr, struct bpf_dynptr *to, __u64 flags);
HELPER(202, long, bpf_dynptr_write, const struct bpf_dynptr *to, __u32 at, void *from, __u32 bytes, __u64 flags);
HELPER(203, void *, bpf_dynptr_data, const struct bpf_dynptr *of, __u32 at, __u32 bytes);

/* What the running kernel has. */
#define field_exists(field) __builtin_preserve_field_info(field, 2)
#define kernel_size_of(type) __builtin_preserve_type_info(*(type *)0, 1)
#define kernel_value_of(type, value) __builtin_preserve_enum_value(*(type *)value, 1)
/* A field of a kernel structure whose address is only a number to the verifier. */
#define READ(pointer, field)                                                                                           \
	({                                                                                                             \
		typeof((pointer)->field) value;                                                                        \
		bpf_probe_read_kernel(&value, sizeof(value), __builtin_preserve_access_index(&(pointer)->field));      \
		value;                                                                                                 \
	})

#endif
