#!/usr/bin/env python3
"""Checks what `farshore demo --keep DIR` left, with public tools only and no code of Farshore's.

It asks `farshore branch open` for recovery points, copies each disk over NBD with `nbdcopy` (or `qemu-img convert`),
and compares with `cmp` against what the source held: the images kept by the demo at its proven points, and for any
other second the start image with the ledger's first k writes replayed by this program. k itself must be a prefix that
the ledger's own times allow. Before that, `farshore vault verify` must find the vault sound.

Exit code 0: everything is equal. 1: something differs, or the vault is damaged. 2: wrong usage or a missing tool.

    tools/verify_second.py [--farshore PROGRAM] [--seconds N] [--at "2026-11-22 14:03:07"]... DIR
"""

import argparse
import datetime
import functools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile

BLOCK = 4096
WORDS = BLOCK // 8
MASK = (1 << 64) - 1
MAGIC = struct.unpack("<Q", b"LEDGERv1")[0]
NS = 1_000_000_000


class Mismatch(Exception):
    """What was recovered is not what the source held."""


def mix(number):
    """The finalizer of splitmix64."""
    z = (number + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@functools.lru_cache(maxsize=1 << 15)
def block(seed, number, offset):
    """The block that write `number` put at byte `offset`."""
    words = [MAGIC, seed, number, offset]
    state = mix((seed + number) & MASK) | 1
    while len(words) < WORDS - 1:
        state ^= (state << 13) & MASK
        state ^= state >> 7
        state ^= (state << 17) & MASK
        words.append(state)
    checksum = 0
    for word in words:
        checksum = (((checksum << 5) | (checksum >> 59)) & MASK) ^ word
    words.append(checksum)
    return struct.pack("<%dQ" % WORDS, *words)


class Ledger:
    """What was written, in order: kept by the writer while it wrote."""

    def __init__(self, path, writes):
        self.slots, self.writes, self.acknowledged = [], [], []
        with open(path, encoding="ascii") as file:
            lines = file.read().split("\n")[:-1]
        heading = "farshore-ledger 1 seed="
        if not lines or not lines[0].startswith(heading):
            raise Mismatch(f"{path} is no ledger")
        self.seed = int(lines[0][len(heading):])
        for line in lines[1:]:
            kind, first, *rest = line.split(" ")
            if kind == "slot":
                self.slots.append(int(rest[0]))
            elif kind == "S" and len(self.writes) < writes:
                if int(first) != len(self.writes) + 1:
                    raise Mismatch(f"{path} leaves out write {len(self.writes) + 1}")
                self.writes.append((int(rest[0]), int(rest[1])))
            elif kind == "A" and int(first) <= writes:
                self.acknowledged.append((int(first), int(rest[0])))

    def last_in_slots(self, k):
        last = [0] * len(self.slots)
        for index, (slot, _) in enumerate(self.writes[:k]):
            last[slot] = index + 1
        return last

    def bounds(self, time_ns, tolerance_ns):
        """The smallest and the largest k that a point of this time may hold."""
        least = max((n for n, at in self.acknowledged if at < time_ns - tolerance_ns), default=0)
        most = sum(1 for _, at in self.writes if at < time_ns + tolerance_ns)
        return least, most

    def prefix_in(self, image):
        """The k such that `image` holds exactly the first k writes."""
        ever = self.last_in_slots(len(self.writes))
        found = [0] * len(self.slots)
        with open(image, "rb") as file:
            for slot, offset in enumerate(self.slots):
                if ever[slot] == 0:
                    continue
                file.seek(offset)
                data = file.read(BLOCK)
                if data == data[:1] * BLOCK:
                    continue
                magic, seed, number, place = struct.unpack_from("<4Q", data)
                written = magic == MAGIC and seed == self.seed and place == offset and 1 <= number <= len(self.writes)
                if not written or self.writes[number - 1][0] != slot or data != block(seed, number, offset):
                    raise Mismatch(f"byte {offset} holds no write of the ledger")
                found[slot] = number
        k = max(found, default=0)
        for slot, expected in enumerate(self.last_in_slots(k)):
            if found[slot] != expected:
                raise Mismatch(f"it holds write {k}, but write {found[slot]} instead of {expected} at byte "
                               f"{self.slots[slot]}: no prefix of what was written")
        return k

    def replay(self, start, k, target):
        """Writes what the source held after the first k writes to `target`."""
        subprocess.run(["cp", "--sparse=always", start, target], check=True)
        with open(target, "r+b") as file:
            for offset, number in zip(self.slots, self.last_in_slots(k)):
                if number:
                    file.seek(offset)
                    file.write(block(self.seed, number, offset))


class Checker:
    def __init__(self, farshore, folder, scratch):
        self.farshore, self.folder, self.scratch = farshore, folder, scratch
        with open(os.path.join(folder, "points.json"), encoding="utf-8") as file:
            self.kept = json.load(file)
        if self.kept["format"] != 1:
            raise Mismatch(f"points.json has format {self.kept['format']}; this program knows 1")
        self.ledger = Ledger(self.path("ledger"), self.kept["writes"])
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("FARSHORE_") or k == "FARSHORE_LOG"}
        self.vault = ["--vault", self.path("vault"), "--recovery-key-file", self.path("recovery_key")]

    def path(self, name):
        return os.path.join(self.folder, self.kept[name])

    def verify_vault(self):
        command = [self.farshore, "vault", "verify", *self.vault]
        done = subprocess.run(command, env=self.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode != 0:
            raise Mismatch("farshore vault verify: " + (done.stdout + done.stderr).strip())
        return done.stdout.strip().splitlines()

    def fetch(self, moment, image):
        """Opens the disk at `moment` and copies all of it to `image`; returns what was opened."""
        state = os.path.join(self.scratch, "s")
        command = [self.farshore, "--json", "branch", "open", self.kept["chain"], "--at", moment, *self.vault,
                   "--state-dir", state, "--local", "--throw-away"]
        log = open(os.path.join(self.scratch, "log"), "w+", encoding="utf-8")
        server = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=log, text=True)
        try:
            line = server.stdout.readline()
            if not line:
                log.seek(0)
                raise Mismatch(f"{moment} cannot be opened: {log.read().strip()}")
            opened = json.loads(line)
            uri = opened["disks"][0]["uri"]
            if shutil.which("nbdcopy"):
                copy = ["nbdcopy", uri, image]
            else:
                copy = ["qemu-img", "convert", "-f", "raw", "-O", "raw", uri, image]
            done = subprocess.run(copy, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode != 0:
                raise Mismatch(f"{moment} cannot be read: {done.stderr.strip()}")
            return opened
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
            log.close()

    def compare(self, one, other, what):
        done = subprocess.run(["cmp", one, other], capture_output=True, text=True)
        if done.returncode != 0:
            raise Mismatch(f"{what}: {done.stdout.strip() or done.stderr.strip()}")

    def check(self, moment, name, image=None, writes=None):
        """Proves one point: its prefix, its bounds, and every byte."""
        recovered = os.path.join(self.scratch, "recovered.raw")
        if os.path.exists(recovered):
            os.remove(recovered)
        opened = self.fetch(moment, recovered)
        k = self.ledger.prefix_in(recovered)
        if writes is not None and k != writes:
            raise Mismatch(f"{name} holds {k} writes, the demo says {writes}")
        least, most = self.ledger.bounds(opened["time_ns"], self.kept["tolerance_ns"])
        # A marker lies within its second: what was submitted before it is known only from the demo.
        if writes is None and not least <= k <= most:
            raise Mismatch(f"{name} holds {k} writes; its moment allows {least} to {most}")
        expected = os.path.join(self.scratch, "expected.raw")
        self.ledger.replay(self.path("start_image"), k, expected)
        self.compare(recovered, expected, f"{name} against the ledger")
        if image:
            self.compare(recovered, os.path.join(self.folder, image), f"{name} against the kept image")
        against = "ledger and kept image" if image else f"ledger (allowed {least} to {most})"
        print(f"equal: {name}: {opened['time']}, write {k}, {os.path.getsize(recovered)} bytes against {against}")


def written(time_ns):
    moment = datetime.datetime.fromtimestamp(time_ns // NS, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def some_seconds(kept, count):
    """Seconds spread over the history that lie in no gap."""
    first, last = kept["openable_ns"]
    candidates = [second * NS for second in range(first // NS + 1, last // NS + 1)]
    good = [at for at in candidates if not any(begin <= at <= end for begin, end in kept["gaps_ns"])]
    if count >= len(good):
        return good
    return [good[(2 * index + 1) * len(good) // (2 * count)] for index in range(count)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="what `farshore demo --keep` left")
    parser.add_argument("--farshore", default="farshore", help="the program to ask")
    parser.add_argument("--seconds", type=int, default=4, help="how many further seconds to check (default 4)")
    parser.add_argument("--at", action="append", default=[], help="check this moment, too; may be repeated")
    arguments = parser.parse_args()
    farshore = shutil.which(arguments.farshore)
    if not farshore:
        parser.error(f"there is no program {arguments.farshore}")
    if not shutil.which("cmp") or not (shutil.which("nbdcopy") or shutil.which("qemu-img")):
        parser.error("needed: cmp (diffutils), and nbdcopy (libnbd) or qemu-img (qemu-utils)")
    with tempfile.TemporaryDirectory(prefix="verify-") as scratch:
        try:
            checker = Checker(os.path.abspath(farshore), os.path.abspath(arguments.folder), scratch)
            for line in checker.verify_vault():
                print(f"vault: {line}")
            for point in checker.kept["points"]:
                checker.check(point["at"], point["name"], point["image"], point["writes"])
            moments = arguments.at + [written(at) for at in some_seconds(checker.kept, arguments.seconds)]
            for moment in moments:
                checker.check(moment, f"the second {moment}")
        except Mismatch as mismatch:
            print(f"MISMATCH: {mismatch}", file=sys.stderr)
            return 1
        except FileNotFoundError as error:
            print(f"error: {error.filename} is missing: this is not what a demo left", file=sys.stderr)
            return 2
    print(f"all equal: {len(checker.kept['points'])} proven points and {len(moments)} further seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main())
