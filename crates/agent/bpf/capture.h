/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the capture programs and the agent share: records of the ring, the control page, the counters of each CPU.
 * The agent's side is src/capture/ebpf/layout.rs.
 */
#ifndef FARSHORE_CAPTURE_H
#define FARSHORE_CAPTURE_H

#define LAYOUT_VERSION 5

/* Epoch e marks in slot e % SLOTS. */
#define SLOTS 3
#define DISKS_MAX 64
/* Protected parts of one whole disk. */
#define PARTS_MAX 8
#define NAME_BYTES_MAX 1024

/* Maps of the dirty area, each map_cells bytes: the heal set (the agent's), then two for each slot. */
#define MAP_UNCOMMITTED(slot) (1 + 2 * (slot))
#define MAP_UNSTREAMED(slot) (2 + 2 * (slot))

/* The (epoch, mode) word: epoch << WORD_SHIFT | WORD_TRACK. */
#define WORD_SHIFT 8
#define WORD_TRACK 1

#define RECORD_MAGIC 0x46534331
enum record_kind { RECORD_WRITE = 1, RECORD_ZERO = 2, RECORD_DISCARD = 3, RECORD_MARKER = 4 };
enum record_flag { RECORD_LAST = 1, RECORD_FUA = 2, RECORD_PREFLUSH = 4 };

/* Why the ring lacks something. */
enum gap { GAP_FULL, GAP_COPY, GAP_MISSED, GAP_NESTED, GAP_UNSUPPORTED, GAP_PASSTHROUGH, GAP_CAUSES };

/* Before the data of a record. A bio is one record, or several with offsets that join, the last one flagged. */
struct record {
	__u32 magic;
	__u8 kind;
	__u8 status; /* not 0: the data could not be copied */
	__u16 disk;
	__u32 epoch;
	__u32 flags;
	__u64 sector; /* of the bio, from the start of the protected disk */
	__u64 time;   /* CLOCK_BOOTTIME, nanoseconds */
	__u64 id;     /* of the bio, the same in all its records */
	__u32 total;  /* bytes of the bio */
	__u32 offset; /* of this record's data within the bio */
	__u32 bytes;  /* of data that follow */
	__u32 reserved;
};

/*
 * TARGET_JOINS: it was added or has grown a moment ago. What completes without having been seen when it was submitted is
 * marked as ever, and breaks no stream: its disk lacks it.
 * TARGET_LEFT: it is not protected any more, and stays only until the flights that were noted have ended.
 */
enum target_flag { TARGET_JOINS = 1, TARGET_LEFT = 2 };

/* A protected disk or partition: the sectors [start, end) of a whole disk. */
struct target {
	__u64 start, end;
	__u64 first_cell; /* within each map */
	__u32 disk;
	__u16 granule_shift; /* bytes of disk that one cell stands for */
	__u16 flags;
};

/* Everything of a whole disk that is protected. Nothing of it overlaps. */
struct targets {
	__u32 count, reserved;
	struct target part[PARTS_MAX];
};

/* One page, mapped by the agent. */
struct control {
	__u64 word;
	__u64 pages;      /* address of page 0's struct page */
	__u64 direct_map; /* address of page 0's bytes */
	__u64 map_cells;
	/* Protected disks, a bit each, that hand the bios of their users on to other disks: they end there. */
	__u64 hands_on;
	__u32 sleeps; /* the reader wants to be woken by the next record; set by the agent, cleared by whoever wakes it */
	__u32 broken; /* the stream is broken: as if every word said track, until the agent rotates */
	/* Calibration: a page with known content, found through a file descriptor of the calling process. */
	__u32 calibrate_tgid, calibrate_fd, calibrate_done, calibrate_step;
	__u64 calibrate_pfn, calibrate_content[2];
	__u32 marker_kind, marker_bytes;
	__u8 marker_name[NAME_BYTES_MAX];
	/* Something unknown was written to the disk. */
	__u8 whole[SLOTS][DISKS_MAX];
};

/* Counters of one CPU. Each CPU writes only its own; the agent reads them all. */
struct cpu {
	/* A program here copies, to this ring position or beyond. */
	__u64 busy, appends_at;
	/* Ring position + 1 from which on something is missing; set by the programs if 0, taken by the agent. */
	__u64 broken_at;
	__u64 gaps[GAP_CAUSES];
	__u64 submitted[SLOTS], completed[SLOTS];
	__u64 unstreamed[SLOTS];
	__u64 next_id;
	/* Statistics. */
	__u64 writes, written_bytes, zeroes, discards, flushes, fuas, tracked, failed, records;
	/* Ends that the second completion programs took because the first ones were skipped. */
	__u64 rescued;
	/* Requests of protected disks whose end a program saw. */
	__u64 ends;
	/* Bios that the agent no longer waits for; counted by the agent, on the first CPU. */
	__u64 untold;
};

/* A bio under way. */
struct flight {
	__u64 sector; /* absolute */
	__u32 bytes;
	__u32 slot;
	__u64 done; /* bytes completed so far */
	__u64 first_cell, start, end;
	__u32 disk;
	__u32 granule_shift;
};

_Static_assert(sizeof(struct record) == 56, "layout.rs");
_Static_assert(sizeof(struct target) == 32, "layout.rs");
_Static_assert(sizeof(struct targets) == 264, "layout.rs");
_Static_assert(sizeof(struct control) == 1312, "layout.rs");
_Static_assert(sizeof(struct flight) == 56, "layout.rs");
_Static_assert(sizeof(struct cpu) == 248, "layout.rs");

#endif
