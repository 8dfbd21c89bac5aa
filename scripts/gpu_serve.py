"""Part `serve`: an 8B server that records and learns: what recording costs, publishing, one copy, deaths.

Two servers with random weights, up together: one that records prompts, one that records decoded tokens, too, inside
SGLang's CUDA graphs. The cost of recording a prompt is measured on one server, the same request recorded and, by its
header, not recorded in turn; that of recording decode between the two. A third one is SGLang without CUDA graphs: what
it says with a published version is compared with what the first says.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpu_lives import Lives
from gpu_part import Part
from gpu_rows import LENGTHS
from gpu_servers import (
    Background,
    Flags,
    Server,
    device_bytes,
    host_room,
    prompts,
    running,
    total_gib,
)

from alchemist.trainer.families import load_shape


class Sizes(NamedTuple):
    scale: int
    """The lengths of prompts are divided by it."""
    pairs: int
    """requests of each kind and length"""
    answer: int
    """tokens where TPOT is measured"""
    answers: int
    """of each server there"""
    slots: int
    """KV slots of the server that records prompts: a row of an 8B model takes 21 of them"""
    decode_slots: int
    publishes: int


SIZES = {
    False: Sizes(1, 10, 128, 6, 200_000, 60_000, 3),
    True: Sizes(32, 2, 8, 2, 8192, 8192, 1),
}
SMALL_GPU_SLOTS = 130_000
"""Where the GPU has less than 100 GiB: prompts of 8k tokens are then recorded in part, and there are two servers."""
EAGER_SLOTS = 4096
EAGER_S = 30.0
"""Of waiting for the third server after the others are ready."""
EXACT_PROMPTS = (64, 500, 1500)
SCORED = 32
"""Tokens whose logprobs are compared, decoded and scored."""


class ServeBench:
    """The two servers and what has been found."""

    def __init__(self, part: Part) -> None:
        self._part, self._sizes = part, SIZES[part.tiny]
        self._folder = part.options.folder
        slots = self._sizes.slots
        has_room = part.device == "cpu" or total_gib() >= 100
        if not has_room:
            slots = SMALL_GPU_SLOTS
        before = device_bytes(part, [])
        host = ("--activation-host-gb", host_room(part))
        record = ("--record", "prefill", *host)
        decode = ("--record", "decode", *host)
        flags = Flags.of(part, slots)
        self.prefill = Server.alchemist("prefill", flags, self._folder, *record)
        flags = Flags.of(part, self._sizes.decode_slots)
        self.decode = Server.alchemist("decode", flags, self._folder, *decode)
        self.eager: Server | None = None
        self._no_eager = "there is no room for a third server"
        if has_room:
            self.eager = Server.eager(Flags.of(part, EAGER_SLOTS), self._folder)
        self.servers = [self.prefill, self.decode, *([self.eager] if self.eager else [])]
        part.config |= {"slots": slots, "decode_slots": self._sizes.decode_slots, "recorded": {}}
        self._lives = Lives(part, self.servers, before, load_shape(str(flags.model)))

    def run(self) -> None:
        part = self._part
        # Before anybody looks at the device's memory.
        part.attempt("the server without graphs", self._wait_eager, [])
        rows = ["one_copy_server", "trainer_restart_s", "trainer_restart_leaked_mib"]
        part.attempt("one copy", self._lives.one_copy, rows, 15)
        for server in (self.prefill, self.decode):
            server.http.post("/v1/training/pause").raise_for_status()
        part.attempt("recording on and off", self._exact, ["recording_changed_tokens"], 5)
        for length in LENGTHS:
            part.attempt(
                f"prompts of {length} tokens",
                lambda length=length: self._ttft(length),
                [f"ttft_recording_{length}"],
                10,
            )
        part.attempt("decode", self._tpot, ["tpot_decode_recording"], 10)
        rows = ["publish_to_first_token_ms", "publish_failed_requests"]
        part.attempt("publishing", self._publish, rows, 10)
        part.attempt("graphs on and off", self._graphs, ["graph_vs_eager_logprobs"], 5)
        rows = ["decode_vs_prefill_logprobs"]
        part.attempt("decoded and prefilled", self._prefilled, rows, 5)
        rows = ["trainer_death_failed_requests"]
        part.attempt("a trainer's death", self._lives.trainer_death, rows, 5)
        rows = ["server_death_trainer_left", "server_death_leaked_mib"]
        part.attempt("a server's death", self._lives.server_death, rows, 12)

    def _wait_eager(self) -> None:
        if self.eager is None:
            return
        try:
            self.eager.wait_ready_by(self._part, EAGER_S)
        except RuntimeError as error:
            # Its memory must not change while that of others is looked at.
            self.eager.process.kill()
            self.eager.process.wait()
            self.eager, self._no_eager = None, str(error)

    def _exact(self) -> None:
        """On a flushed cache each time, one request at a time, so that both are computed in the same shapes."""
        wrong = total = 0
        lengths = [max(8, n // self._sizes.scale) for n in EXACT_PROMPTS]
        asked = [next(prompts(self._part, length, seed=length)) for length in lengths]
        found: dict[bool, list[Any]] = {}
        for is_recorded in (False, True):
            self.prefill.flush_cache()
            answers = [self.prefill.generate(p, 24, is_recorded=is_recorded) for p in asked]
            found[is_recorded] = [a["meta_info"]["output_token_logprobs"] for a in answers]
        for off, on in zip(found[False], found[True], strict=True):
            total += len(off)
            # Token and logprob, to the bit.
            wrong += sum(a[:2] != b[:2] for a, b in zip(off, on, strict=True))
        against = f"{total} tokens and their logprobs, the same server, not recorded"
        self._part.add("recording_changed_tokens", float(wrong), against=against)

    def _ttft(self, length: int) -> None:
        tokens = max(8, length // self._sizes.scale)
        draw = prompts(self._part, tokens, seed=length)
        ratios, recorded = [], 0
        self.prefill.stream(next(draw), 2)
        for i in range(self._sizes.pairs):
            times = {}
            for is_recorded in (True, False) if i % 2 else (False, True):
                # Slots that the radix tree keeps for earlier prompts are not there to be borrowed.
                self.prefill.flush_cache()
                answer = self.prefill.stream(next(draw), 2, is_recorded=is_recorded)
                times[is_recorded] = answer.ttft_ms
                if is_recorded:
                    recorded += self._num_recorded(answer.rid)
            ratios.append(times[True] / times[False])
        share = recorded / (tokens * self._sizes.pairs)
        self._part.config["recorded"][length] = share
        self._part.add(
            f"ttft_recording_{length}",
            ratios,
            against=f"the same server, not recorded; {share:.0%} of the others' tokens had a row",
        )

    def _num_recorded(self, rid: str) -> int:
        for _ in range(40):
            # An answer reaches the client a moment before the server has stored it.
            answer = self.prefill.http.get(f"/v1/completions/{rid}/receipt")
            if answer.is_success and answer.json()["state"] != "streaming":
                return int(answer.json()["recorded_tokens"])
            time.sleep(0.05)
        return 0

    def _tpot(self) -> None:
        draw = prompts(self._part, 64, seed=7)
        for server in (self.prefill, self.decode):
            server.stream(next(draw), self._sizes.answer)
        ratios = []
        for i in range(self._sizes.answers):
            times = {}
            servers = (self.prefill, self.decode)
            for server in servers if i % 2 else reversed(servers):
                times[server.name] = server.stream(next(draw), self._sizes.answer).tpot_ms
            ratios.append(times["decode"] / times["prefill"])
        against = f"--record prefill, one request of {self._sizes.answer} tokens at a time"
        self._part.add("tpot_decode_recording", ratios, against=against)

    def _publish(self) -> None:
        server, draw = self.prefill, prompts(self._part, 256 // min(4, self._sizes.scale), seed=11)
        times, parts = [], []
        with Background(server, prompts(self._part, 32, seed=12), tokens=8, pause_s=0.2) as other:
            for _ in range(self._sizes.publishes):
                rids = [server.stream(next(draw), 16).rid for _ in range(4)]
                metrics = server.train(rids)
                answer = server.stream(next(draw), 2)
                times.append(metrics["publish_s"] * 1e3 + answer.ttft_ms)
                parts.append({k: v for k, v in metrics.items() if k.startswith("publish")})
        server.http.post("/v1/training/pause").raise_for_status()
        self._part.config["publish"] = parts
        against = "load, probe and switch, then a request of 256 tokens"
        self._part.add("publish_to_first_token_ms", times, against=against)
        if other.failed:
            self._part.config["failed_while_publishing"] = other.failed[:3]
        self._part.add("publish_failed_requests", float(len(other.failed)), n=other.done)

    def _live(self) -> str:
        live = str(self.prefill.status()["live_version"])
        if live == "v0":
            raise RuntimeError("no version was published, so no adapter can be compared")
        return live

    def _graphs(self) -> None:
        """What decode in CUDA graphs said, against a server that has none, of the same weights and adapter."""
        if self.eager is None:
            raise RuntimeError(self._no_eager)
        live, draw = self._live(), prompts(self._part, 48, seed=13)
        self.eager.load_adapter(live, self._folder / "prefill" / "versions" / live)
        worst, total, parted = [], 0, 0
        for _ in range(4):
            prompt = next(draw)
            answers = [
                server.generate(prompt, SCORED, lora_path=live)["meta_info"]
                for server in (self.prefill, self.eager)
            ]
            found = apart(*(answer["output_token_logprobs"] for answer in answers))
            worst.append(found.difference)
            total += found.tokens
            parted += found.tokens < SCORED
        against = (
            f"the largest of {total} tokens by {live}; {parted} of {len(worst)} answers parted"
        )
        self._part.add("graph_vs_eager_logprobs", worst, value=max(worst), against=against)

    def _prefilled(self) -> None:
        """What decode said of its tokens, against a prefill over the same tokens."""
        server, live = self.prefill, self._live()
        draw, worst = prompts(self._part, 48, seed=14), []
        for _ in range(4):
            prompt = next(draw)
            decoded = server.generate(prompt, SCORED, lora_path=live)
            ids = decoded["output_ids"]
            scored = server.generate(
                [*prompt, *ids], 1, lora_path=live, logprob_start_len=len(prompt) - 1
            )
            before = [e[0] for e in decoded["meta_info"]["output_token_logprobs"]]
            after = [e[0] for e in scored["meta_info"]["input_token_logprobs"][-len(ids) :]]
            worst.append(max(abs(a - b) for a, b in zip(before, after, strict=True)))
        against = f"the largest of {len(worst)} answers of {SCORED} tokens by {live}"
        self._part.add("decode_vs_prefill_logprobs", worst, value=max(worst), against=against)


class Apart(NamedTuple):
    difference: float
    """nats, the largest"""
    tokens: int
    """that were compared"""


def apart(one: Sequence[Sequence[Any]], other: Sequence[Sequence[Any]]) -> Apart:
    """How far two greedy answers to one prompt are apart. Compared up to the first token in which they differ: that one
    too, for each is the likeliest of its own distribution, and the greatest of two functions differ by no more than
    the functions do. What follows it has another context.

    Args:
        one: (logprob, token id, …) of each token.
    """
    worst, count = 0.0, 0
    for (ours, token, *_), (theirs, its_token, *_) in zip(one, other, strict=True):
        worst, count = max(worst, abs(ours - theirs)), count + 1
        if token != its_token:
            break
    return Apart(worst, count)


def main() -> None:
    part = Part.from_argv("serve", __doc__ or "")

    def measure() -> None:
        bench = ServeBench(part)
        with running(part, bench.servers[:2], bench.servers[2:]):
            bench.run()

    part.attempt("servers", measure, part.row_names, 30)


if __name__ == "__main__":
    main()
