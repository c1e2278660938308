// SPDX-License-Identifier: GPL-2.0-only
/*
 * The capture programs: mark and copy every write of the protected disks.
 *
 * block_bio_queue     mark *uncommitted*, note the bio as in flight, then append its data to the ring, or mark
 *                     *unstreamed*. The (epoch, mode) word is read once for each bio.
 * block_rq_complete   end flights; a failed write, and one that was never seen when submitted, is marked *unstreamed*.
 * block_bio_complete  the same for drivers without requests, and for bios that fail before they are one.
 * block_rq_issue      commands that write without a bio: nobody knows what they change, so the whole disk is named.
 *
 * An agent that sleeps is woken by the next record, see `wakes`.
 *
 * Variants: *dynptr* (5.19+) appends one record a bio; *bounded* (5.8+) records of 4 KiB.
 *
 * Order. Whatever the ring lacks is recorded with the ring's position (`broken_at`) before the program returns: before
 * the write can complete, or before anyone is told that it did. So a write that depends on a missing one always lies at
 * or after a position that the agent, once it sees that write, sees too. What slips in before was in flight together with
 * the missing one, and no one promised an order between them.
 *
 * This file and its object are GPL-2.0-only: the kernel offers the helpers used here to no other licence.
 */
#include "helpers.h"
#include "capture.h"

char LICENSE[] SEC("license") = "GPL";

/* Only what is used of the kernel's types; the loader finds the fields in the running kernel. */
#define KERNEL __attribute__((preserve_access_index))

typedef __u64 sector_t;
struct gendisk {
	int major, first_minor;
} KERNEL;
struct block_device {
	struct gendisk *bd_disk;
} KERNEL;
struct page {
	unsigned long flags;
} KERNEL;
/* Copied as raw memory: this layout is that of every kernel since 5.1. */
struct bio_vec {
	struct page *bv_page;
	unsigned int bv_len, bv_offset;
};
struct bvec_iter {
	sector_t bi_sector;
	unsigned int bi_size, bi_idx, bi_bvec_done;
} KERNEL;
typedef struct {
	int counter;
} atomic_t;
struct bio {
	struct bio *bi_next;
	struct block_device *bi_bdev;
	unsigned int bi_opf;
	unsigned char bi_status;
	atomic_t __bi_remaining;
	struct bvec_iter bi_iter;
	void *bi_private;
	struct bio_vec *bi_io_vec;
} KERNEL;
struct bio___before_5_12 {
	struct gendisk *bi_disk;
} KERNEL;
struct request_queue {
	struct gendisk *disk;
} KERNEL;
struct request {
	struct request_queue *q;
	struct bio *bio;
	unsigned int cmd_flags;
} KERNEL;
struct request___before_5_17 {
	struct gendisk *rq_disk;
} KERNEL;
struct xarray {
	void *xa_head;
} KERNEL;
struct address_space {
	struct xarray i_pages;
} KERNEL;
struct file {
	struct address_space *f_mapping;
} KERNEL;
struct fdtable {
	struct file **fd;
} KERNEL;
struct files_struct {
	struct fdtable *fdt;
} KERNEL;
struct task_struct {
	struct files_struct *files;
} KERNEL;
enum req_op {
	OP_WRITE = 1,
	OP_DISCARD = 3,
	OP_SECURE_ERASE = 5,
	OP_WRITE_ZEROES = 9,
	OP_DRV_OUT = 35,
};
/* Values differ between kernels. */
enum req_flag_bits { __REQ_FUA = 13, __REQ_PREFLUSH = 18 };

/*
 * Kernels up to 5.10 pass (queue, bio) to block_bio_queue and (queue, request) to block_rq_issue, unless their
 * maintainers took over a part of what changed then. The loader counts the arguments and sets these.
 */
const volatile __u32 queue_before_bio = 0, queue_before_request = 0;

#define PAGE_BYTES 4096ull
#define SECTOR_SHIFT 9
/* Data of one record in the bounded variant, and the smaller slice of the dynptr one. */
#define CHUNK 4096
/* The larger slice: pages of one bio_vec lie side by side in the direct map. */
#define SLICE 65536
/* Records of one bio in the bounded variant: 8 MiB. The verifier remembers two branches for each, of at most 8192. */
#define CHUNKS_BOUNDED 2048
/* Steps of the bounded variant over granules, most of them eight wide: half a GiB of the finest. */
#define MARKS_BOUNDED 1024
/* Bios of one request that the bounded variant looks at. */
#define BIOS_BOUNDED 256
#define BIOS_MAX (1 << 16)
/* How often a bio is split that was split off already: by the device that it was submitted to, and by those below. */
#define SPLITS_MAX 4
#define MARKS_MAX (1 << 22)
/* Bios in flight at a time on all protected disks; each more breaks the stream. */
#define FLIGHTS_MAX 65536

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 26);
} ring SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct control);
} control SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct cpu);
} cpus SEC(".maps");
/* Bytes and not bits: a plain store needs no atomic instruction. Eight cells an element. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1 << 10);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u64);
} dirty SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, DISKS_MAX);
	__type(key, __u64);
	__type(value, struct targets);
} targets SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, FLIGHTS_MAX);
	__type(key, __u64);
	__type(value, struct flight);
} flights SEC(".maps");
/* Room for the copy of one bio: too much for the stack. */
struct work {
	__u8 bytes[CHUNK];
	struct record head;
	__u64 vec;
	__u32 index, skip, left, unused;
};
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct work);
} works SEC(".maps");
/*
 * The events that this CPU's completion programs have taken, those of interrupted ones first. The kernel runs no program
 * within itself: when an interrupt ends requests while another end is looked at, the program is skipped. So each of them
 * is attached twice, and the second takes what the first did not get. Each knows events by address.
 */
#define NESTED_MAX 8
struct taken {
	__u64 event[NESTED_MAX];
	__u32 count, unused;
};
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, struct taken);
} taken SEC(".maps");
/* What the agent keeps for its successor. No program looks at it. */
struct ledger {
	__u8 bytes[4096];
};
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct ledger);
} ledger SEC(".maps");

#ifdef PLANTED
/*
 * Mistakes for tests, in an object of their own: what checks the capture must notice each of them. Every
 * `planted_every`th time, what `planted` says is forgotten.
 */
enum plant { PLANT_WRITE = 1, PLANT_COMPLETION, PLANT_UNCOMMITTED, PLANT_UNSTREAMED, PLANT_GAP, PLANT_SKIP, PLANT_WAKE };
const volatile __u32 planted = 0, planted_every = 1;
__u64 planted_times = 0;

static __always_inline bool plants(__u32 plant)
{
	return planted == plant && !(++planted_times % (planted_every ? planted_every : 1));
}
#else
#define plants(plant) false
#endif

#define READ_ONCE(x) (*(volatile typeof(x) *)&(x))
#define WRITE_ONCE(x, value) (*(volatile typeof(x) *)&(x) = (value))

static __always_inline struct control *the_control(void)
{
	__u32 zero = 0;
	return bpf_map_lookup_elem(&control, &zero);
}

static __always_inline struct cpu *this_cpu(void)
{
	__u32 cpu = bpf_get_smp_processor_id();
	return bpf_map_lookup_elem(&cpus, &cpu);
}

static __always_inline __u64 key_of(struct gendisk *disk)
{
	return (__u64)(__u32)disk->major << 32 | (__u32)disk->first_minor;
}

static __always_inline struct targets *targets_of(struct gendisk *disk)
{
	if (!disk)
		return 0;
	__u64 key = key_of(disk);
	return bpf_map_lookup_elem(&targets, &key);
}

static __always_inline bool is_left(struct target *t)
{
	return t->flags & TARGET_LEFT;
}

/*
 * Which protected parts of the disk `key` the sectors [sector, stop) touch: how many << 8 | the number of the first.
 * A function of its own, like set_cells.
 */
__attribute__((noinline)) __u32 touched(__u64 key, __u64 sector, __u64 stop)
{
	struct targets *all = bpf_map_lookup_elem(&targets, &key);
	__u32 found = 0, first = 0;
	if (!all)
		return 0;
	for (__u32 i = 0; i < PARTS_MAX; i++) {
		if (i < all->count && sector < all->part[i].end && stop > all->part[i].start &&
		    !is_left(&all->part[i])) {
			if (!found)
				first = i;
			found++;
		}
	}
	return found << 8 | first;
}

/* Whether any protected part of the disk `key` has none of these flags. A function of its own, like set_cells. */
__attribute__((noinline)) int any_without(__u64 key, __u32 flags)
{
	struct targets *all = bpf_map_lookup_elem(&targets, &key);
	if (!all)
		return 0;
	for (__u32 i = 0; i < PARTS_MAX; i++)
		if (i < all->count && !(all->part[i].flags & flags))
			return 1;
	return 0;
}

/* ---- marking ---- */

struct marks {
	__u64 cell, last;
};

static __always_inline void set_cell(__u64 cell)
{
	__u32 element = cell >> 3;
	__u8 *cells = bpf_map_lookup_elem(&dirty, &element);
	/* Read first: a rewritten granule is the common case, and its cache line stays shared. */
	if (cells && !cells[cell & 7])
		cells[cell & 7] = 1;
}

static int set_cell_each(__u32 i, struct marks *marks)
{
	if (marks->cell > marks->last)
		return 1;
	set_cell(marks->cell++);
	return 0;
}

/* A function of its own, which the verifier looks at once and not in every state of its callers. */
__attribute__((noinline)) int set_cells(__u64 cell, __u64 last)
{
	for (int i = 0; i < MARKS_BOUNDED; i++) {
		if (cell > last)
			return 1;
		if (!(cell & 7) && cell + 7 <= last) {
			__u32 element = cell >> 3;
			__u64 *cells = bpf_map_lookup_elem(&dirty, &element);
			if (cells)
				*cells = 0x0101010101010101ull;
			cell += 8;
		} else {
			set_cell(cell++);
		}
	}
	return cell > last;
}

/* Marks [sector, sector + bytes), clipped to [start, end), in map `map`. False if it did not get through. */
static __always_inline bool mark(struct control *c, __u64 first_cell, __u64 start, __u64 end, __u32 granule_shift,
				 __u32 map, __u64 sector, __u64 bytes, const bool loops)
{
	__u64 stop = sector + ((bytes + 511) >> SECTOR_SHIFT);
	if (sector < start)
		sector = start;
	if (stop > end)
		stop = end;
	if (sector >= stop || plants(map & 1 ? PLANT_UNCOMMITTED : PLANT_UNSTREAMED))
		return true;
	__u32 shift = (granule_shift - SECTOR_SHIFT) & 31;
	__u64 base = map * c->map_cells + first_cell;
	struct marks marks = {
		.cell = base + ((sector - start) >> shift),
		.last = base + ((stop - 1 - start) >> shift),
	};
	set_cell(marks.cell++);
	if (marks.cell > marks.last)
		return true;
	if (loops) {
		bpf_loop(MARKS_MAX, set_cell_each, &marks, 0);
		return marks.cell > marks.last;
	}
	return set_cells(marks.cell, marks.last);
}

/* The verifier has to see each bound where it matters, also where the compiler knows better. */
#define FORGET(value) asm volatile("" : "+r"(value))

static __always_inline void count(__u64 *of_slots, __u32 slot)
{
	FORGET(slot);
	if (slot < SLOTS)
		__sync_fetch_and_add(&of_slots[slot], 1);
}

static __always_inline void mark_whole(struct control *c, struct cpu *cpu, __u32 slot, __u32 disk)
{
	FORGET(slot);
	FORGET(disk);
	if (slot < SLOTS && disk < DISKS_MAX) {
		c->whole[slot][disk] = 1;
		count(cpu->unstreamed, slot);
	}
}

static __always_inline void mark_unstreamed(struct control *c, struct cpu *cpu, __u32 slot, __u32 disk, __u64 first_cell,
					    __u64 start, __u64 end, __u32 granule_shift, __u64 sector, __u64 bytes,
					    const bool loops)
{
	if (mark(c, first_cell, start, end, granule_shift, MAP_UNSTREAMED(slot), sector, bytes, loops))
		count(cpu->unstreamed, slot);
	else
		mark_whole(c, cpu, slot, disk);
}

/* The stream lacks something from ring position `at` on. */
static __always_inline void break_stream(struct control *c, struct cpu *cpu, __u64 at, const __u32 cause)
{
	if (plants(PLANT_GAP))
		return;
	/* One that is there already is older, and the agent takes it before it opens another epoch. */
	if (!READ_ONCE(cpu->broken_at))
		WRITE_ONCE(cpu->broken_at, at + 1);
	WRITE_ONCE(c->broken, 1);
	__sync_fetch_and_add(&cpu->gaps[cause], 1);
}

static __always_inline __u64 position(void)
{
	return bpf_ringbuf_query(&ring, BPF_RB_PROD_POS);
}

static __always_inline __u32 slot_now(struct control *c)
{
	return (__u32)(READ_ONCE(c->word) >> WORD_SHIFT) % SLOTS;
}

/* Names the whole of each protected part of the disk `key` that [sector, stop) touches. */
__attribute__((noinline)) int mark_parts(__u64 key, __u64 sector, __u64 stop, __u32 slot)
{
	struct targets *all = bpf_map_lookup_elem(&targets, &key);
	struct control *c = the_control();
	struct cpu *cpu = this_cpu();
	if (!all || !c || !cpu)
		return 0;
	for (__u32 i = 0; i < PARTS_MAX; i++)
		if (i < all->count && sector < all->part[i].end && stop > all->part[i].start && !is_left(&all->part[i]))
			mark_whole(c, cpu, slot, all->part[i].disk);
	return 0;
}

/* Names the whole of each disk that hands bios on. A function of its own, like set_cells. */
__attribute__((noinline)) int mark_hands_on(__u32 slot)
{
	struct control *c = the_control();
	struct cpu *cpu = this_cpu();
	if (!c || !cpu)
		return 0;
	__u64 disks = READ_ONCE(c->hands_on);
	for (__u32 i = 0; i < DISKS_MAX; i++)
		if (disks >> i & 1)
			mark_whole(c, cpu, slot, i);
	return 0;
}

/* The disk `key` was changed, nobody knows where. */
static __always_inline void changed_somewhere(struct control *c, struct cpu *cpu, __u32 slot, __u64 key,
					      const __u32 cause)
{
	if (!any_without(key, TARGET_LEFT))
		return;
	break_stream(c, cpu, position(), cause);
	mark_parts(key, 0, ~0ull, slot);
}

static __always_inline struct target *part_of(struct targets *all, __u32 parts)
{
	FORGET(parts);
	return &all->part[parts & (PARTS_MAX - 1)];
}

/* ---- copying ---- */

static __always_inline __u64 bytes_of_page(struct control *c, __u64 page)
{
	return c->direct_map + (page - c->pages) / kernel_size_of(struct page) * PAGE_BYTES;
}

/*
 * How a request's last record is submitted: with a wake-up if the agent has said that it sleeps, which costs those that find
 * it awake one load.
 *
 * The agent sets the word, looks at the ring, and sleeps for long only if it finds the word still set and the ring still
 * empty at a second look, milliseconds after the first. The load here may be done before the ring's new position, stored
 * when the record was reserved, is seen by other CPUs, so the first look may miss it while we miss the word. The store has
 * left the CPU long before the second look, which finds the record, or finds it being written, and then there is no sleep. A
 * record reserved after the second look finds the word. If all that were wrong, the agent's sleep has an end of its own, and what
 * waits for it waits in the ring.
 */
static __always_inline __u64 wakes(struct control *c)
{
	if (!READ_ONCE(c->sleeps) || plants(PLANT_WAKE))
		return BPF_RB_NO_WAKEUP;
	WRITE_ONCE(c->sleeps, 0);
	return BPF_RB_FORCE_WAKEUP;
}

enum outcome { APPENDED, NO_ROOM, NOT_COPIED };

struct copy {
	struct control *c;
	struct work *w;
	struct bpf_dynptr *to;
	__u64 vec;
	__u32 index, skip, left, offset, failed, unused;
};

/* The next piece of the bio in memory: where, and how long. 0: it cannot be read. */
static __always_inline __u32 next_piece(struct control *c, __u64 vec, __u32 index, __u32 skip, __u32 left, __u64 *from)
{
	struct bio_vec bv;
	if (bpf_probe_read_kernel(&bv, sizeof(bv), (void *)(vec + (__u64)index * sizeof(bv))) || bv.bv_len <= skip)
		return 0;
	*from = bytes_of_page(c, (__u64)bv.bv_page) + bv.bv_offset + skip;
	__u32 bytes = bv.bv_len - skip;
	return bytes < left ? bytes : left;
}

static int copy_piece(__u32 i, struct copy *copy)
{
	__u64 from = 0;
	if (!copy->left)
		return 1;
	__u32 bytes = next_piece(copy->c, copy->vec, copy->index, copy->skip, copy->left, &from);
	__u32 rest = bytes, at = sizeof(struct record) + copy->offset;
	copy->failed = 1; /* until it succeeded */
	if (!bytes)
		return 1;
	if (bytes >= SLICE) {
		void *to = bpf_dynptr_data(copy->to, at, SLICE);
		if (!to || bpf_probe_read_kernel(to, SLICE, (void *)from))
			return 1;
		bytes = SLICE;
	} else if (bytes >= CHUNK) {
		void *to = bpf_dynptr_data(copy->to, at, CHUNK);
		if (!to || bpf_probe_read_kernel(to, CHUNK, (void *)from))
			return 1;
		bytes = CHUNK;
	} else {
		/* A slice has a constant size; what is shorter goes through memory of ours. */
		if (bpf_probe_read_kernel(copy->w->bytes, bytes & (CHUNK - 1), (void *)from))
			return 1;
		if (bpf_dynptr_write(copy->to, at, copy->w->bytes, bytes & (CHUNK - 1), 0))
			return 1;
	}
	copy->failed = 0;
	copy->offset += bytes;
	copy->left -= bytes;
	copy->skip += bytes;
	if (bytes == rest) {
		copy->skip = 0;
		copy->index++;
	}
	return 0;
}

/* One record for the whole bio. */
static __always_inline enum outcome append_dynptr(struct control *c, struct cpu *cpu, struct work *w)
{
	struct bpf_dynptr to;
	enum outcome outcome = APPENDED;
	__u32 data = w->head.kind == RECORD_WRITE ? w->head.total : 0;
	if (bpf_ringbuf_reserve_dynptr(&ring, sizeof(struct record) + (__u64)data, 0, &to)) {
		bpf_ringbuf_discard_dynptr(&to, BPF_RB_NO_WAKEUP);
		return NO_ROOM;
	}
	if (data) {
		struct copy copy = {
			.c = c, .w = w, .to = &to, .vec = w->vec, .index = w->index, .skip = w->skip, .left = data,
		};
		bpf_loop(1 << 20, copy_piece, &copy, 0);
		if (copy.failed || copy.left)
			outcome = NOT_COPIED;
	}
	w->head.bytes = data;
	w->head.offset = 0;
	w->head.status = outcome;
	w->head.flags |= RECORD_LAST;
	bpf_dynptr_write(&to, 0, &w->head, sizeof(w->head), 0);
	bpf_ringbuf_submit_dynptr(&to, wakes(c));
	cpu->records++;
	return outcome;
}

struct chunk {
	struct record head;
	__u8 data[CHUNK];
};

static __always_inline enum outcome append_small(struct control *c, struct cpu *cpu, struct work *w)
{
	struct record *to = bpf_ringbuf_reserve(&ring, sizeof(*to), 0);
	if (!to)
		return NO_ROOM;
	*to = w->head;
	to->flags |= RECORD_LAST;
	to->bytes = to->offset = 0;
	bpf_ringbuf_submit(to, wakes(c));
	cpu->records++;
	return APPENDED;
}

/*
 * The next record of 4 KiB at most; `w` says where to go on. A function of its own: what the verifier looks at would
 * be multiplied by the number of records otherwise.
 */
__attribute__((noinline)) int append_chunk(__u32 unused)
{
	__u32 zero = 0;
	__u64 from = 0;
	struct work *w = bpf_map_lookup_elem(&works, &zero);
	struct control *c = the_control();
	struct cpu *cpu = this_cpu();
	if (!w || !c || !cpu)
		return NOT_COPIED;
	__u32 rest = next_piece(c, w->vec, w->index, w->skip, w->left, &from), bytes = rest;
	if (!rest)
		return NOT_COPIED;
	struct chunk *to = bpf_ringbuf_reserve(&ring, sizeof(*to), 0);
	if (!to)
		return NO_ROOM;
	bool copied;
	if (rest >= CHUNK) {
		bytes = CHUNK;
		copied = !bpf_probe_read_kernel(to->data, CHUNK, (void *)from);
	} else {
		/* Some verifiers lose a bound that they did not see on this very value. */
		FORGET(rest);
		copied = !bpf_probe_read_kernel(to->data, rest & (CHUNK - 1), (void *)from);
		rest = bytes;
	}
	to->head = w->head;
	to->head.bytes = bytes;
	to->head.status = copied ? APPENDED : NOT_COPIED;
	w->left -= bytes;
	__u64 wakeup = BPF_RB_NO_WAKEUP;
	if (!w->left || !copied) {
		to->head.flags |= RECORD_LAST;
		wakeup = wakes(c);
	}
	bpf_ringbuf_submit(to, wakeup);
	cpu->records++;
	if (!copied)
		return NOT_COPIED;
	w->head.offset += bytes;
	w->skip += bytes;
	if (bytes == rest) {
		w->skip = 0;
		w->index++;
	}
	return APPENDED;
}

/* Records of 4 KiB for the `w->left` bytes of a bio. */
static __always_inline enum outcome append_chunks(struct work *w)
{
	for (int i = 0; i < CHUNKS_BOUNDED && w->left; i++) {
		int outcome = append_chunk(0);
		if (outcome != APPENDED)
			return outcome == NO_ROOM ? NO_ROOM : NOT_COPIED;
	}
	return w->left ? NOT_COPIED : APPENDED;
}

/* ---- submission ---- */

static __always_inline void settle(struct control *c, struct cpu *cpu, struct flight *f, enum outcome outcome,
				   const bool loops)
{
	if (outcome != APPENDED) {
		break_stream(c, cpu, cpu->appends_at, outcome == NO_ROOM ? GAP_FULL : GAP_COPY);
		mark_unstreamed(c, cpu, f->slot, f->disk, f->first_cell, f->start, f->end, f->granule_shift, f->sector, f->bytes, loops);
	}
	WRITE_ONCE(cpu->busy, 0);
}

static __always_inline int submitted(struct bio *bio, const bool loops)
{
	__u32 opf = bio->bi_opf, op = opf & 0xff, bytes = bio->bi_iter.bi_size, zero = 0;
	struct gendisk *disk;
	/* Odd operations change the device. */
	if (!(op & 1) || op == OP_DRV_OUT)
		return 0;
	if (field_exists(bio->bi_bdev)) {
		struct block_device *device = bio->bi_bdev;
		disk = device->bd_disk;
	} else {
		disk = ((struct bio___before_5_12 *)bio)->bi_disk;
	}
	struct targets *all = targets_of(disk);
	if (!all)
		return 0;
	struct control *c = the_control();
	struct cpu *cpu = this_cpu();
	struct work *w = bpf_map_lookup_elem(&works, &zero);
	if (!c || !cpu || !w)
		return 0;
	__u32 flags = 0;
	if (opf & (1u << kernel_value_of(enum req_flag_bits, __REQ_PREFLUSH))) {
		flags |= RECORD_PREFLUSH;
		cpu->flushes++;
	}
	__u64 sector = bio->bi_iter.bi_sector, stop = sector + (bytes >> SECTOR_SHIFT), device = key_of(disk);
	__u32 parts = bytes ? touched(device, sector, stop) : 0;
	if (!parts)
		return 0;
	struct target *t = part_of(all, parts);
	if (opf & (1u << kernel_value_of(enum req_flag_bits, __REQ_FUA))) {
		flags |= RECORD_FUA;
		cpu->fuas++;
	}

	/* The only reading of the word. */
	__u64 word = READ_ONCE(c->word);
	__u32 epoch = word >> WORD_SHIFT;
	struct flight f = {
		.sector = sector,
		.bytes = bytes,
		.slot = epoch % SLOTS,
		.first_cell = t->first_cell,
		.start = t->start,
		.end = t->end,
		.disk = t->disk,
		.granule_shift = t->granule_shift,
	};
	__u64 key = (__u64)bio;
	if (!mark(c, f.first_cell, f.start, f.end, f.granule_shift, MAP_UNCOMMITTED(f.slot), sector, bytes, loops))
		mark_whole(c, cpu, f.slot, f.disk);
	/* The flight is of the first; a bio across several parts is no part's to stream, see `inside`. */
	if (parts >> 8 > 1)
		mark_parts(device, sector, stop, f.slot);
	struct flight *stale = bpf_map_lookup_elem(&flights, &key);
	if (stale)
		/* Its end was missed; that it has ended is known now. */
		count(cpu->completed, stale->slot);
	if (bpf_map_update_elem(&flights, &key, &f, BPF_ANY)) {
		/* Its completion marks it again, as that of one that was never seen. */
		break_stream(c, cpu, position(), GAP_MISSED);
		mark_unstreamed(c, cpu, f.slot, f.disk, f.first_cell, f.start, f.end, f.granule_shift, sector, bytes, loops);
		return 0;
	}
	count(cpu->submitted, f.slot);

	__u8 kind = 0;
	if (op == OP_WRITE) {
		kind = RECORD_WRITE;
		cpu->writes++;
		cpu->written_bytes += bytes;
	} else if (op == OP_WRITE_ZEROES) {
		kind = RECORD_ZERO;
		cpu->zeroes++;
	} else if (op == OP_DISCARD || op == OP_SECURE_ERASE) {
		kind = RECORD_DISCARD;
		cpu->discards++;
	}
	bool tracks = word & WORD_TRACK || READ_ONCE(c->broken);
	bool inside = sector >= f.start && stop <= f.end;
	/* An interrupt submits while a program here copies: the room for the copy is taken. */
	bool nested = READ_ONCE(cpu->busy) != 0;
	if (tracks || !inside || !kind || nested) {
		cpu->tracked++;
		mark_unstreamed(c, cpu, f.slot, f.disk, f.first_cell, f.start, f.end, f.granule_shift, sector, bytes, loops);
		if (!tracks)
			break_stream(c, cpu, position(), nested ? GAP_NESTED : GAP_UNSUPPORTED);
		return 0;
	}

	if (plants(PLANT_WRITE))
		return 0;
	WRITE_ONCE(cpu->busy, 1);
	cpu->appends_at = position();
	w->head = (struct record){
		.magic = RECORD_MAGIC,
		.kind = kind,
		.disk = f.disk,
		.epoch = epoch,
		.flags = flags,
		.sector = sector - f.start,
		.time = bpf_ktime_get_boot_ns(),
		.id = (__u64)bpf_get_smp_processor_id() << 48 | (cpu->next_id++ & 0xffffffffffffull),
		.total = bytes,
	};
	w->vec = (__u64)bio->bi_io_vec;
	w->index = bio->bi_iter.bi_idx;
	w->skip = bio->bi_iter.bi_bvec_done;
	w->left = 0;
	if (loops) {
		settle(c, cpu, &f, append_dynptr(c, cpu, w), loops);
		return 0;
	}
	enum outcome outcome;
	if (kind == RECORD_WRITE) {
		w->left = bytes;
		outcome = append_chunks(w);
	} else {
		outcome = append_small(c, cpu, w);
	}
	settle(c, cpu, &f, outcome, loops);
	return 0;
}

SEC("tp_btf/block_bio_queue")
int queue_dynptr(__u64 *ctx)
{
	return submitted((struct bio *)ctx[0], true);
}

SEC("tp_btf/block_bio_queue")
int queue_bounded(__u64 *ctx)
{
	return queue_before_bio ? submitted((struct bio *)ctx[1], false) : submitted((struct bio *)ctx[0], false);
}

/* ---- completion ---- */

enum ends { ENDS_OF_REQUESTS, ENDS_OF_BIOS };

/* Whether this program, the first or the second of its tracepoint, is the one for `event`. */
static __always_inline bool takes(__u32 ends, __u64 event, const bool second)
{
	struct taken *t = bpf_map_lookup_elem(&taken, &ends);
	if (!t)
		return !second;
	/* As the kernel skips it. */
	if (!second && plants(PLANT_SKIP))
		return false;
	__u32 count = t->count;
	FORGET(count);
	if (!second) {
		/* Leftovers: a second program that was skipped within another one did not take its event away. */
		if (count >= NESTED_MAX)
			count = 0;
		t->event[count & (NESTED_MAX - 1)] = event;
		t->count = count + 1;
		return true;
	}
	__u32 own = NESTED_MAX;
	for (__u32 i = 0; i < NESTED_MAX; i++)
		if (i < count && t->event[i] == event)
			own = i;
	if (own < NESTED_MAX) {
		/* What lies behind it came in between, and is over. */
		t->count = own;
		return false;
	}
	struct cpu *cpu = this_cpu();
	if (cpu)
		cpu->rescued++;
	return true;
}

struct walk {
	struct control *c;
	struct cpu *cpu;
	struct targets *all;
	__u64 bio, device;
	__u32 left, error, slot, unused;
};

/* The flight that [sector, sector + bytes) of the bio `key` belongs to. */
static __always_inline struct flight *flight_of(__u64 key, __u64 sector, __u32 bytes)
{
	struct flight *f = bpf_map_lookup_elem(&flights, &key);
	if (f && sector >= f->sector && (sector - f->sector) * 512 + bytes <= f->bytes)
		return f;
	return 0;
}

static __always_inline void end_flight(struct cpu *cpu, __u64 key, __u32 slot)
{
	if (plants(PLANT_COMPLETION))
		return;
	/* The last two parts of a bio may end on two CPUs at once: one of them takes the flight away, and counts. */
	if (!bpf_map_delete_elem(&flights, &key))
		count(cpu->completed, slot);
}

static __always_inline int complete_bio(struct walk *walk, const bool loops)
{
	if (!walk->bio || !walk->left)
		return 1;
	struct bio *bio = (void *)walk->bio;
	__u64 sector = READ(bio, bi_iter.bi_sector), key = walk->bio;
	__u32 bytes = READ(bio, bi_iter.bi_size);
	if (bytes > walk->left)
		bytes = walk->left;
	struct flight *f = flight_of(key, sector, bytes);
	if (!f) {
		/* Split off: the front part is a bio of its own and points to the one that was submitted. */
		key = (__u64)READ(bio, bi_private);
		f = flight_of(key, sector, bytes);
	}
	if (f) {
		__u32 slot = f->slot;
		if (walk->error) {
			walk->cpu->failed++;
			mark_unstreamed(walk->c, walk->cpu, slot, f->disk, f->first_cell, f->start, f->end,
					f->granule_shift, sector, bytes, loops);
		}
		__sync_fetch_and_add(&f->done, bytes);
		if (READ_ONCE(f->done) >= f->bytes)
			end_flight(walk->cpu, key, slot);
	} else if (bytes) {
		__u64 stop = sector + (bytes >> SECTOR_SHIFT);
		__u32 parts = touched(walk->device, sector, stop);
		if (parts) {
			struct target *t = part_of(walk->all, parts);
			if (!(t->flags & TARGET_JOINS))
				break_stream(walk->c, walk->cpu, position(), GAP_MISSED);
			mark_unstreamed(walk->c, walk->cpu, walk->slot, t->disk, t->first_cell, t->start, t->end,
					t->granule_shift, sector, bytes, loops);
			if (parts >> 8 > 1)
				mark_parts(walk->device, sector, stop, walk->slot);
		}
	}
	walk->left -= bytes;
	walk->bio = (__u64)READ(bio, bi_next);
	return 0;
}

/*
 * The key of the flight of the bio at `at`, or of the one that it was split off, and so on. 0: there is none. A function of
 * its own, like set_cells.
 */
__attribute__((noinline)) __u64 key_above(__u64 at)
{
	__u64 key = at;
	for (int i = 0; i < SPLITS_MAX && key; i++) {
		if (bpf_map_lookup_elem(&flights, &key))
			return key;
		struct bio *bio = (void *)key;
		key = (__u64)READ(bio, bi_private);
	}
	return 0;
}

/*
 * A bio that ends on a disk which is not protected may have been submitted to one that is: md's stripes and NVMe's multipath
 * hand the bios of their users on as they are, and what they split off. Which sectors it has there says nothing here.
 * Returns the bytes that this bio accounts for. A function of its own, like set_cells.
 */
__attribute__((noinline)) __u32 end_elsewhere(__u64 at, __u32 left, __u32 error)
{
	struct control *c = the_control();
	struct cpu *cpu = this_cpu();
	struct bio *bio = (void *)at;
	__u32 bytes = READ(bio, bi_iter.bi_size);
	if (bytes > left)
		bytes = left;
	__u64 key = key_above(at);
	struct flight *f = key ? bpf_map_lookup_elem(&flights, &key) : 0;
	if (!f || !c || !cpu || !(READ_ONCE(c->hands_on) >> (f->disk & (DISKS_MAX - 1)) & 1))
		return bytes;
	__u32 slot = f->slot;
	if (error) {
		cpu->failed++;
		mark_unstreamed(c, cpu, slot, f->disk, f->first_cell, f->start, f->end, f->granule_shift, f->sector, f->bytes, false);
	}
	__sync_fetch_and_add(&f->done, bytes);
	if (READ_ONCE(f->done) >= f->bytes)
		end_flight(cpu, key, slot);
	return bytes;
}

static int end_elsewhere_each(__u32 i, struct walk *walk)
{
	if (!walk->bio || !walk->left)
		return 1;
	struct bio *bio = (void *)walk->bio;
	walk->left -= end_elsewhere(walk->bio, walk->left, walk->error);
	walk->bio = (__u64)READ(bio, bi_next);
	return 0;
}

static int complete_bio_each(__u32 i, struct walk *walk)
{
	return complete_bio(walk, true);
}

/* A function of its own, like set_cells. Returns the bytes that this bio accounts for. */
__attribute__((noinline)) __u32 complete_bio_bounded(__u64 bio, __u64 device, __u32 left, __u32 error, __u32 slot)
{
	struct walk walk = {
		.c = the_control(),
		.cpu = this_cpu(),
		.all = bpf_map_lookup_elem(&targets, &device),
		.bio = bio,
		.device = device,
		.left = left,
		.error = error,
		.slot = slot,
	};
	if (!walk.c || !walk.cpu || !walk.all)
		return 0;
	complete_bio(&walk, false);
	return left - walk.left;
}

static __always_inline struct gendisk *disk_of(struct request *rq)
{
	if (field_exists(((struct request_queue *)0)->disk)) {
		struct request_queue *q = rq->q;
		return q ? q->disk : 0;
	}
	return ((struct request___before_5_17 *)rq)->rq_disk;
}

static __always_inline int completed(struct request *rq, __u32 error, __u32 bytes, const bool loops, const bool second)
{
	/* First of all: the kernel counts what it skips, of whatever disk. */
	if (!takes(ENDS_OF_REQUESTS, (__u64)rq, second))
		return 0;
	__u32 op = rq->cmd_flags & 0xff;
	if (!(op & 1) || op == OP_DRV_OUT || !bytes)
		return 0;
	struct gendisk *disk = disk_of(rq);
	struct targets *all = targets_of(disk);
	struct control *c = the_control();
	struct cpu *cpu = this_cpu();
	if (!c || !cpu || (!all && !READ_ONCE(c->hands_on)))
		return 0;
	if (!all) {
		struct walk elsewhere = {
			.bio = (__u64)READ(rq, bio),
			.left = bytes,
			.error = error & 0xff,
		};
		if (loops)
			bpf_loop(BIOS_MAX, end_elsewhere_each, &elsewhere, 0);
		else
			for (int i = 0; i < BIOS_BOUNDED; i++)
				if (end_elsewhere_each(i, &elsewhere))
					break;
		return 0;
	}
	cpu->ends++;
	__u64 device = key_of(disk);
	struct walk walk = {
		.c = c,
		.cpu = cpu,
		.all = all,
		.device = device,
		/* Read as a number: pointers that the verifier knows do not go to functions that take one. */
		.bio = (__u64)READ(rq, bio),
		.left = bytes,
		.error = error & 0xff,
		.slot = slot_now(c),
	};
	if (loops) {
		bpf_loop(BIOS_MAX, complete_bio_each, &walk, 0);
	} else {
		for (int i = 0; i < BIOS_BOUNDED && walk.bio && walk.left; i++) {
			struct bio *bio = (void *)walk.bio;
			__u64 next = (__u64)READ(bio, bi_next);
			walk.left -= complete_bio_bounded(walk.bio, device, walk.left, walk.error, walk.slot);
			walk.bio = next;
		}
	}
	if (walk.left && walk.bio)
		changed_somewhere(c, cpu, walk.slot, device, GAP_MISSED);
	return 0;
}

#define COMPLETE(name, loops, second)                                                                                  \
	SEC("tp_btf/block_rq_complete")                                                                                \
	int name(__u64 *ctx)                                                                                           \
	{                                                                                                              \
		return completed((struct request *)ctx[0], ctx[1], ctx[2], loops, second);                             \
	}
COMPLETE(complete_dynptr, true, false)
COMPLETE(complete_dynptr_second, true, true)
COMPLETE(complete_bounded, false, false)
COMPLETE(complete_bounded_second, false, true)

static __always_inline int ended(struct bio *bio, const bool loops, const bool second)
{
	/* First of all: the kernel counts what it skips, of whatever disk. */
	if (!takes(ENDS_OF_BIOS, (__u64)bio, second))
		return 0;
	__u32 op = bio->bi_opf & 0xff;
	if (!(op & 1) || op == OP_DRV_OUT)
		return 0;
	__u64 key = (__u64)bio;
	struct control *c = the_control();
	struct cpu *cpu = this_cpu();
	if (!c || !cpu)
		return 0;
	struct flight *f = bpf_map_lookup_elem(&flights, &key);
	if (f) {
		/* NVMe's multipath tells of the end of a bio whose front parts, split off, may be under way. */
		if (bio->__bi_remaining.counter > 1)
			return 0;
		if (bio->bi_status) {
			cpu->failed++;
			mark_unstreamed(c, cpu, f->slot, f->disk, f->first_cell, f->start, f->end, f->granule_shift, f->sector, f->bytes,
					loops);
		}
		end_flight(cpu, key, f->slot);
		return 0;
	}
	struct gendisk *disk;
	if (field_exists(bio->bi_bdev)) {
		struct block_device *device = bio->bi_bdev;
		disk = device->bd_disk;
	} else {
		disk = ((struct bio___before_5_12 *)bio)->bi_disk;
	}
	struct targets *all = targets_of(disk);
	/* An empty flush, or a part of one that is in flight and tells of its end itself. Read as a number, see `completed`. */
	if (!all || (op == OP_WRITE && !bio->bi_io_vec) || key_above((__u64)READ(bio, bi_private)))
		return 0;
	/* For a discard to its stripes md sends some of its own: when the last of them ended, so did the flight. */
	if (op == OP_DISCARD && READ_ONCE(c->hands_on) >> (all->part[0].disk & (DISKS_MAX - 1)) & 1)
		return 0;
	/* The driver has advanced it: nobody knows any more where it began. */
	if (any_without(key_of(disk), TARGET_LEFT | TARGET_JOINS))
		changed_somewhere(c, cpu, slot_now(c), key_of(disk), GAP_MISSED);
	else
		mark_parts(key_of(disk), 0, ~0ull, slot_now(c));
	return 0;
}

#define END(name, loops, second)                                                                                       \
	SEC("tp_btf/block_bio_complete")                                                                               \
	int name(__u64 *ctx)                                                                                           \
	{                                                                                                              \
		return ended((struct bio *)ctx[1], loops, second);                                                     \
	}
END(end_dynptr, true, false)
END(end_dynptr_second, true, true)
END(end_bounded, false, false)
END(end_bounded_second, false, true)

static __always_inline int issued(struct request *rq)
{
	if ((rq->cmd_flags & 0xff) != OP_DRV_OUT)
		return 0;
	struct gendisk *disk = disk_of(rq);
	struct targets *all = targets_of(disk);
	struct control *c = the_control();
	struct cpu *cpu = this_cpu();
	if (!c || !cpu)
		return 0;
	if (all) {
		changed_somewhere(c, cpu, slot_now(c), key_of(disk), GAP_PASSTHROUGH);
	} else if (disk && READ_ONCE(c->hands_on)) {
		/* Perhaps to one of the disks below: nobody knows which they are. */
		break_stream(c, cpu, position(), GAP_PASSTHROUGH);
		mark_hands_on(slot_now(c));
	}
	return 0;
}

SEC("tp_btf/block_rq_issue")
int issue(__u64 *ctx)
{
	return queue_before_request ? issued((struct request *)ctx[1]) : issued((struct request *)ctx[0]);
}

/* ---- markers and calibration, run by the agent ---- */

/* Appends the marker described in the control page. Run on request, never attached. 1: it is in the ring. */
SEC("raw_tp/sys_exit")
int emit_marker(void *ctx)
{
	struct control *c = the_control();
	if (!c)
		return 0;
	__u64 word = READ_ONCE(c->word);
	if (word & WORD_TRACK || READ_ONCE(c->broken))
		return 0;
	struct {
		struct record head;
		__u8 name[NAME_BYTES_MAX];
	} *to = bpf_ringbuf_reserve(&ring, sizeof(*to), 0);
	if (!to)
		return 0;
	to->head = (struct record){
		.magic = RECORD_MAGIC,
		.kind = RECORD_MARKER,
		.epoch = word >> WORD_SHIFT,
		.flags = RECORD_LAST,
		.sector = c->marker_kind,
		.time = bpf_ktime_get_boot_ns(),
		.total = c->marker_bytes,
		.bytes = c->marker_bytes,
	};
	bpf_probe_read_kernel(to->name, sizeof(to->name), c->marker_name);
	bpf_ringbuf_submit(to, BPF_RB_NO_WAKEUP);
	return 1;
}

struct search {
	__u64 base, pfn, content[2], found;
};

static __always_inline int try_base(__u32 i, struct search *s)
{
	__u64 seen[2];
	__u64 base = s->base - ((__u64)i << 30);
	if (!bpf_probe_read_kernel(seen, sizeof(seen), (void *)(base + s->pfn * PAGE_BYTES)) && seen[0] == s->content[0] &&
	    seen[1] == s->content[1]) {
		s->found = base;
		return 1;
	}
	return 0;
}

/*
 * Finds where struct pages and their bytes lie. The agent has a page with random content whose number it knows; its
 * struct page is reached through the file descriptor, its bytes are searched in steps of 1 GiB below this task, which
 * lies in the direct map too. 256 steps a system call, until found.
 */
SEC("raw_tp/sys_enter")
int calibrate(void *ctx)
{
	struct control *c = the_control();
	if (!c || !c->calibrate_tgid || c->calibrate_done || bpf_get_current_pid_tgid() >> 32 != c->calibrate_tgid)
		return 0;
	struct task_struct *task = (void *)bpf_get_current_task();
	struct files_struct *open = READ(task, files);
	struct fdtable *table = READ(open, fdt);
	struct file **files = READ(table, fd), *file = 0;
	bpf_probe_read_kernel(&file, sizeof(file), files + c->calibrate_fd);
	/* One page in the file: the head of its tree is that page. */
	struct address_space *mapping = READ(file, f_mapping);
	__u64 page = (__u64)READ(mapping, i_pages.xa_head);
	struct search s = {
		.base = ((__u64)task & ~((1ull << 30) - 1)) - ((__u64)c->calibrate_step << 30),
		.pfn = c->calibrate_pfn,
		.content = { c->calibrate_content[0], c->calibrate_content[1] },
	};
	c->calibrate_step += 256;
	for (int i = 0; i < 256; i++)
		if (try_base(i, &s))
			break;
	if (!s.found)
		return 0;
	c->pages = page - c->calibrate_pfn * kernel_size_of(struct page);
	c->direct_map = s.found;
	WRITE_ONCE(c->calibrate_done, 1);
	return 0;
}
