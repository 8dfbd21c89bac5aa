"""The ledger: votes, steps, versions, recovery; always on a real SQLite file; see also test_store.py."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from ledger_support import completion, vote

from alchemist.server import ledger as ledger_module
from alchemist.server.errors import Conflict, InvalidRequest, LedgerError, NotFound
from alchemist.server.ledger import Ledger
from alchemist.server.records import Trainable, Vote


def add_voted(ledger: Ledger, count: int) -> list[str]:
    for number in range(count):
        ledger.add_completion(completion(f"c{number}"))
    return [vote(ledger, f"c{number}")[0].id for number in range(count)]


def commit(ledger: Ledger, version: int, trained: list[str], parent: int | None = None, **changes):
    directory = ledger.directory / "versions" / f"v{version}"
    directory.mkdir(parents=True)
    return ledger.commit_step(
        parent=version - 1 if parent is None else parent,
        version=version,
        step=version,
        path=directory,
        metrics={"loss": 0.5, "tokens_reused": 7},
        trained=trained,
        **changes,
    ).result()


def test_completion_round_trip(ledger: Ledger) -> None:
    given = completion(created=12.5, extra_key="k", sampling={"odd": {1}, "stop": ["a"]})
    ledger.add_completion(given).result()
    got = ledger.get_completion("c1").result()
    assert got.sampling["stop"] == ["a"]
    assert (got.prompt_ids, got.response_ids) == ([1, 2, 3], [4, 5])
    assert got.response_logprobs == [-0.5, -0.25]
    assert (got.created, got.extra_key, got.state) == (12.5, "k", "done")
    with pytest.raises(NotFound, match="'nope'"):
        ledger.get_completion("nope").result()


def test_votes_on_answers_of_the_latest_versions_are_trained_first(ledger: Ledger) -> None:
    for number, version in enumerate([0, 3, 1, 2, 3, 5]):
        ledger.add_completion(completion(f"c{number}", version=version))
    ids = [vote(ledger, f"c{number}")[0].id for number in range(6)]

    def batch(limit: int, **options):
        found = ledger.next_batch(limit, **options).result()
        return [ids.index(item.feedback_id) for item in found]

    assert batch(4) == [0, 1, 2, 3]
    assert batch(2, versions=[4, 2, 3]) == [1, 3]
    # Nobody waits for ever: the others follow, and a batch is in the order of its votes.
    assert batch(4, versions=[4, 2, 3]) == [0, 1, 3, 4]
    assert batch(9, versions=[4, 2, 3]) == [0, 1, 2, 3, 4, 5]


def test_vote_is_created_then_replaced(ledger: Ledger) -> None:
    ledger.add_completion(completion())
    first, is_new = vote(ledger, rating=1, user="ann", tags=["a"], metadata={"k": [1]})
    assert is_new
    assert (first.state, first.tags, first.metadata) == ("pending", ["a"], {"k": [1]})
    second, is_new = vote(ledger, rating=-1, user="ann", correction="better")
    assert not is_new
    assert second.id == first.id
    assert (second.rating, second.correction, second.tags) == (-1, "better", [])
    assert ledger.get_feedback(first.id).result() == second
    other, is_new = vote(ledger, rating=1, user="bob")
    anonymous, is_new_too = vote(ledger, rating=1)
    assert is_new
    assert is_new_too
    assert len({first.id, other.id, anonymous.id}) == 3
    assert vote(ledger, rating=-1)[0].id == anonymous.id
    assert ledger.count("pending").result() == 3


def test_unknown_completion(ledger: Ledger) -> None:
    with pytest.raises(NotFound) as caught:
        vote(ledger, "nope")
    assert (caught.value.param, caught.value.code) == ("completion_id", "completion_not_found")
    assert ledger.count("pending").result() == 0


def test_client_chosen_ids(ledger: Ledger) -> None:
    add_voted(ledger, 2)
    assert vote(ledger, "c0", user="u", id="mine")[0].id == "mine"
    with pytest.raises(Conflict, match="another answer or user"):
        vote(ledger, "c1", user="u", id="mine")
    with pytest.raises(InvalidRequest) as caught:
        vote(ledger, "c1", user="w", id="../../x")
    assert caught.value.param == "id"


def test_idempotency_key(ledger: Ledger) -> None:
    ledger.add_completion(completion())
    once = Vote(completion_id="c1", rating=1)
    first = ledger.put_feedback(once, idempotency_key="k").result()
    vote(ledger, rating=-1)
    assert ledger.put_feedback(once, idempotency_key="k").result() == first
    assert ledger.get_feedback(first[0].id).result().rating == -1
    with pytest.raises(InvalidRequest, match="Idempotency-Key"):
        ledger.put_feedback(Vote(completion_id="c1", rating=-1), idempotency_key="k").result()


def test_feedback_on_a_streaming_completion_waits(ledger: Ledger) -> None:
    ledger.mark_streaming("c1")
    early, _ = vote(ledger)
    assert early.state == "waiting"
    assert ledger.next_batch(10).result() == []
    ledger.add_completion(completion())
    item = ledger.next_batch(10).result()[0]
    assert item.feedback_id == early.id
    assert item.completion.response_ids == [4, 5]
    ledger.mark_streaming("c2")
    late, _ = vote(ledger, "c2")
    assert ledger.drop_completion("c2", "aborted before the first token").result() == 1
    failed = ledger.get_feedback(late.id).result()
    assert (failed.state, failed.reason) == ("failed", "aborted before the first token")
    with pytest.raises(NotFound):
        vote(ledger, "c3")


def test_votes_of_an_unfinished_answer_fail_at_restart(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite3"
    first = Ledger(path)
    first.mark_streaming("c1")
    feedback, _ = vote(first)
    first.close()
    second = Ledger(path)
    found = second.recover().result()
    assert (found.num_failed_feedback, found.live, found.staged) == (1, 0, None)
    again = second.get_feedback(feedback.id).result()
    assert again.state == "failed"
    assert "never finished" in (again.reason or "")
    second.close()


def test_a_reused_request_id_does_not_change_what_was_voted_on(ledger: Ledger) -> None:
    ledger.add_completion(completion())
    ledger.add_completion(completion(response_ids=[6]))
    assert ledger.next_batch(1).result() == []
    assert ledger.get_completion("c1").result().response_ids == [6]
    vote(ledger)
    ledger.add_completion(completion(response_ids=[7, 8, 9])).result()
    assert ledger.get_completion("c1").result().response_ids == [6]


def test_list_pages_and_filters(ledger: Ledger) -> None:
    ids = add_voted(ledger, 5)
    newest, has_more = ledger.list_feedback(limit=2).result()
    assert [f.id for f in newest] == ids[:-3:-1]
    assert has_more
    rest, has_more = ledger.list_feedback(limit=3, after=newest[-1].id).result()
    assert [f.id for f in rest] == ids[2::-1]
    assert not has_more
    oldest, _ = ledger.list_feedback(limit=2, is_ascending=True, after=ids[0]).result()
    assert [f.id for f in oldest] == ids[1:3]
    mine, _ = ledger.list_feedback(completion_id="c3", state="pending").result()
    assert [f.id for f in mine] == [ids[3]]
    assert ledger.list_feedback(user="nobody").result() == ([], False)
    with pytest.raises(NotFound, match="list after"):
        ledger.list_feedback(after="nope").result()


def test_delete(ledger: Ledger) -> None:
    (first,) = add_voted(ledger, 1)
    assert ledger.delete_feedback(first).result().id == first
    with pytest.raises(NotFound):
        ledger.get_feedback(first).result()
    with pytest.raises(NotFound):
        ledger.delete_feedback(first).result()


def test_a_step_consumes_its_votes_once(ledger: Ledger) -> None:
    ids = add_voted(ledger, 4)
    batch = ledger.next_batch(3).result()
    assert [item.feedback_id for item in batch] == ids[:3]
    assert batch[0].label
    commit(ledger, 1, ids[:2], failed={ids[2]: "too long"})
    assert [ledger.get_feedback(i).result().state for i in ids] == [
        *("trained", "trained", "failed", "pending")
    ]
    trained = ledger.get_feedback(ids[0]).result()
    assert (trained.step, trained.version) == (1, 1)
    version = ledger.get_version(1).result()
    assert (version.state, version.parent, version.feedback_ids) == ("staged", 0, ids[:2])
    step = ledger.last_step().result()
    assert step is not None
    assert step.metrics["loss"] == 0.5
    for change in (lambda: vote(ledger, "c0"), lambda: ledger.delete_feedback(ids[0]).result()):
        with pytest.raises(Conflict, match="part of version v1") as caught:
            change()
        assert caught.value.code == "feedback_consumed"


@pytest.mark.parametrize("wrong", ["consumed vote", "unknown vote", "version", "step", "parent"])
def test_a_wrong_step_changes_nothing(ledger: Ledger, wrong: str) -> None:
    ids = add_voted(ledger, 3)
    commit(ledger, 1, ids[:1])
    trained = {"consumed vote": ids[:2][::-1], "unknown vote": [ids[1], "nope"]}.get(wrong, ids[1:])
    answer = ledger.commit_step(
        parent=9 if wrong == "parent" else 1,
        version=1 if wrong == "version" else 2,
        step=1 if wrong == "step" else 2,
        path="x",
        metrics={},
        trained=trained,
    )
    with pytest.raises(LedgerError):
        answer.result()
    assert ledger.count("pending").result() == 2
    assert ledger.count("trained").result() == 1
    assert len(ledger.versions().result()) == 2
    assert len(ledger.steps().result()) == 1


def test_a_vote_in_training_cannot_be_changed_until_released(ledger: Ledger) -> None:
    ids = add_voted(ledger, 2)
    ledger.next_batch(1).result()
    with pytest.raises(Conflict, match="is being trained") as caught:
        vote(ledger, "c0", rating=-1)
    assert caught.value.code == "feedback_consumed"
    vote(ledger, "c1", rating=-1)
    ledger.release_batch().result()
    assert vote(ledger, "c0", rating=-1)[0].id == ids[0]
    assert [item.label for item in ledger.next_batch(5).result()] == [False, False]


def add_answers(ledger: Ledger, *answers: tuple[list[int], int, int]) -> list[str]:
    """Votes on answers given as (prompt, one response token, rating); ids in order."""
    ids = []
    for number, (prompt, token, rating) in enumerate(answers):
        rid = f"p{number}"
        ledger.add_completion(completion(rid, prompt_ids=prompt, response_ids=[token]))
        ids.append(vote(ledger, rid, rating)[0].id)
    return ids


def matches(ledger: Ledger, limit: int = 100) -> dict[str, str]:
    return {i.feedback_id: i.match for i in ledger.next_batch(limit, pairs=True).result()}


def test_opposite_votes_on_one_prompt_make_a_pair(ledger: Ledger) -> None:
    a, b = [1, 2], [1, 3]
    up_a, up_b, down_c, down_a, up_a2, down_b = add_answers(
        ledger, (a, 5, 1), (b, 5, 1), ([9], 5, -1), (a, 6, -1), (a, 7, 1), (b, 6, -1)
    )
    assert matches(ledger) == {up_a: up_a, down_a: up_a, up_b: up_b, down_b: up_b}
    assert ledger.trainable(9, pairs=True).result().count == 4
    assert ledger.trainable(9).result().count == 6
    # The oldest pair, whole.
    assert matches(ledger, limit=1) == {up_a: up_a, down_a: up_a}
    commit(ledger, 1, [up_a, down_a, up_b, down_b])
    assert matches(ledger) == {}
    assert ledger.get_feedback(up_a2).result().state == "pending"
    assert ledger.get_feedback(down_c).result().state == "pending"


def test_a_correction_is_a_pair_and_equal_answers_are_none(ledger: Ledger) -> None:
    up, down = add_answers(ledger, ([1], 5, 1), ([1], 5, -1))
    assert matches(ledger) == {}
    assert ledger.trainable(9, pairs=True).result().count == 0
    vote(ledger, "p1", -1, correction="better")
    assert matches(ledger) == {down: down}
    assert ledger.get_feedback(up).result().state == "pending"


def test_a_vote_waits_from_when_it_could_be_trained(tmp_path: Path) -> None:
    clock = 100.0
    with contextlib.closing(Ledger(tmp_path / "a.sqlite3", now=lambda: clock)) as ledger:
        assert ledger.trainable(9).result() == Trainable(count=0, waited_s=0.0)
        for rid in ("c0", "c1"):
            ledger.add_completion(completion(rid))
        first = vote(ledger, "c0")[0].id
        clock = 130.0
        vote(ledger, "c1")
        clock = 150.0
        assert ledger.trainable(1).result() == Trainable(count=1, waited_s=50.0)
        assert ledger.trainable(9).result() == Trainable(count=2, waited_s=50.0)
        commit(ledger, 1, [first])
        assert ledger.trainable(9).result() == Trainable(count=1, waited_s=20.0)
        clock = 200.0
        ledger.set_version_state(1, "failed", "a test", requeue=True).result()
        clock = 210.0
        assert ledger.trainable(9).result() == Trainable(count=2, waited_s=80.0)
        clock = 90.0
        assert ledger.trainable(9).result() == Trainable(count=2, waited_s=0.0)


def test_a_pair_waits_from_its_later_vote(tmp_path: Path) -> None:
    clock = 100.0
    with contextlib.closing(Ledger(tmp_path / "a.sqlite3", now=lambda: clock)) as ledger:
        for rid, token in (("c0", 5), ("c1", 6), ("c2", 7)):
            ledger.add_completion(completion(rid, prompt_ids=[1], response_ids=[token]))
        vote(ledger, "c0", 1)
        clock = 130.0
        vote(ledger, "c1", -1)
        clock = 150.0
        vote(ledger, "c2", -1, correction="better")
        clock = 160.0
        assert ledger.trainable(9).result() == Trainable(count=3, waited_s=60.0)
        assert ledger.trainable(9, pairs=True).result() == Trainable(count=3, waited_s=30.0)


def test_the_same_batch_is_handed_out_again_until_committed(ledger: Ledger) -> None:
    ids = add_voted(ledger, 3)
    for _ in range(2):
        assert [item.feedback_id for item in ledger.next_batch(2).result()] == ids[:2]
    commit(ledger, 1, ids[:2])
    assert [item.feedback_id for item in ledger.next_batch(2).result()] == ids[2:]


def test_exactly_one_version_is_live(ledger: Ledger) -> None:
    ids = add_voted(ledger, 3)
    for version in (1, 2, 3):
        commit(ledger, version, [ids[version - 1]])
        ledger.set_version_state(version, "live").result()
        assert ledger.live_version().result() == version
    states = {v.version: v.state for v in ledger.versions().result()}
    assert states == {0: "retired", 1: "retired", 2: "retired", 3: "live"}
    assert ledger.rollback_target().result() == 2
    ledger.set_version_state(2, "live").result()
    assert ledger.rollback_target().result() == 1
    ledger.set_version_state(0, "live").result()
    assert ledger.rollback_target().result() is None
    with pytest.raises(Conflict):
        ledger.set_version_state(0, "retired").result()
    with pytest.raises(NotFound):
        ledger.set_version_state(9, "live").result()
    assert ledger.live_version().result() == 0


def test_a_failed_version_can_give_its_votes_back(ledger: Ledger) -> None:
    ids = add_voted(ledger, 2)
    commit(ledger, 1, ids)
    ledger.set_version_state(1, "failed", "probe differs", requeue=True).result()
    assert ledger.count("pending").result() == 2
    assert ledger.live_version().result() == 0
    with pytest.raises(Conflict, match="failed"):
        ledger.set_version_state(1, "live").result()
    commit(ledger, 2, ids, parent=0)
    assert ledger.get_feedback(ids[0]).result().version == 2


def test_pruned_versions_cannot_go_live(ledger: Ledger) -> None:
    ids = add_voted(ledger, 4)
    for version in (1, 2, 3, 4):
        commit(ledger, version, [ids[version - 1]])
        ledger.set_version_state(version, "live").result()
    paths = ledger.prune_versions(1).result()
    assert [Path(p).name for p in paths] == ["v1", "v2"]
    assert ledger.prune_versions(1).result() == []
    with pytest.raises(Conflict, match="no longer kept"):
        ledger.set_version_state(1, "live").result()
    ledger.set_version_state(3, "live").result()
    assert ledger.rollback_target().result() == 0


def test_recovery_of_versions(tmp_path: Path) -> None:
    path = tmp_path / "data" / "ledger.sqlite3"
    first = Ledger(path)
    ids = add_voted(first, 4)
    commit(first, 1, [ids[0]])
    first.set_version_state(1, "live").result()
    for version in (2, 3, 4):
        commit(first, version, [ids[version - 1]])
    (first.directory / "versions" / "v4").rmdir()
    first.close()
    second = Ledger(path)
    found = second.recover().result()
    assert (found.live, found.staged) == (1, 3)
    assert [Path(p).name for p in found.directories] == ["v3", "v2", "v1"]
    states = {v.version: v.state for v in second.versions().result()}
    assert states == {0: "retired", 1: "live", 2: "retired", 3: "staged", 4: "failed"}
    # v4's directory is gone, and what it had learned with it.
    assert [second.get_feedback(i).result().state for i in ids] == [*["trained"] * 3, "pending"]
    (second.directory / "versions" / "v1").rmdir()
    found = second.recover().result()
    # v3 was made from it, and is published.
    assert (found.live, found.staged) == (0, 3)
    assert [second.get_feedback(i).result().state for i in ids] == [*["trained"] * 3, "pending"]
    # Where it cannot be, nothing that serves has learned from any of them.
    second.set_version_state(3, "failed", "probe differs", requeue=True).result()
    assert [second.get_feedback(i).result().state for i in ids] == ["pending"] * 4
    second.close()


def test_a_staged_version_that_fails_takes_what_it_contained_with_it_and_no_more(
    tmp_path: Path,
) -> None:
    first = Ledger(tmp_path / "data" / "ledger.sqlite3")
    ids = add_voted(first, 4)
    for version in (1, 2):
        commit(first, version, [ids[version - 1]])
        first.set_version_state(version, "live").result()
    for version in (3, 4):
        commit(first, version, [ids[version - 1]])
    first.close()
    second = Ledger(tmp_path / "data" / "ledger.sqlite3")
    assert second.recover().result().staged == 4
    second.set_version_state(4, "failed", "probe differs", requeue=True).result()
    states = [second.get_feedback(i).result().state for i in ids]
    assert states == ["trained", "trained", "pending", "pending"]
    second.close()


def test_a_version_that_fails_keeps_the_votes_of_what_a_person_rolled_back(ledger: Ledger) -> None:
    ids = add_voted(ledger, 3)
    for version in (1, 2):
        commit(ledger, version, [ids[version - 1]])
        ledger.set_version_state(version, "live").result()
    commit(ledger, 3, [ids[2]])
    ledger.set_version_state(1, "live").result()
    ledger.set_version_state(3, "failed", "v1 was made live during the step", requeue=True).result()
    states = [ledger.get_feedback(i).result().state for i in ids]
    assert states == ["trained", "trained", "pending"]


def test_recovery_without_the_live_versions_directory(tmp_path: Path) -> None:
    """An ancestor serves, not what was rolled back; what it has not learned is pending again."""
    first = Ledger(tmp_path / "data" / "ledger.sqlite3")
    ids = add_voted(first, 4)
    for version, parent in ((1, 0), (2, 1), (3, 1), (4, 3)):
        commit(first, version, [ids[version - 1]], parent=parent)
        first.set_version_state(version, "live").result()
    for version in (3, 4):
        (first.directory / "versions" / f"v{version}").rmdir()
    first.close()
    second = Ledger(tmp_path / "data" / "ledger.sqlite3")
    found = second.recover().result()
    assert (found.live, found.staged) == (1, None)
    states = [second.get_feedback(i).result().state for i in ids]
    assert states == ["trained", "trained", "pending", "pending"]
    second.close()


def test_recovery_publishes_nothing_that_was_not_trained_from_what_is_live(tmp_path: Path) -> None:
    """A version whose publishing failed, and a later one made from the same parent that is live."""
    first = Ledger(tmp_path / "data" / "ledger.sqlite3")
    ids = add_voted(first, 3)
    commit(first, 1, [ids[0]])
    first.set_version_state(1, "live").result()
    commit(first, 2, [ids[1]])
    commit(first, 3, [ids[2]], parent=1)
    first.set_version_state(3, "live").result()
    first.close()
    second = Ledger(tmp_path / "data" / "ledger.sqlite3")
    found = second.recover().result()
    assert (found.live, found.staged) == (3, None)
    assert second.get_version(2).result().state == "failed"
    assert [second.get_feedback(i).result().state for i in ids] == ["trained", "pending", "trained"]
    second.close()


def test_a_moved_data_directory_keeps_its_versions(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "a" / "ledger.sqlite3")
    commit(first, 1, add_voted(first, 1))
    first.close()
    (tmp_path / "a").rename(tmp_path / "b")
    second = Ledger(tmp_path / "b" / "ledger.sqlite3")
    assert second.get_version(1).result().path == str(tmp_path / "b" / "versions" / "v1")
    assert second.recover().result().staged == 1
    second.close()


def test_settings_and_metrics(ledger: Ledger) -> None:
    assert ledger.get_setting("paused", False).result() is False
    ledger.set_setting("paused", True).result()
    assert ledger.get_setting("paused").result() is True
    ids = add_voted(ledger, 2)
    assert ledger.sum_metric("tokens_reused").result() == 0
    commit(ledger, 1, ids[:1])
    commit(ledger, 2, ids[1:])
    assert ledger.sum_metric("tokens_reused").result() == 14


def test_old_completions_without_votes_are_pruned(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ledger_module, "_PRUNE_EVERY", 10)
    ledger = Ledger(tmp_path / "l.sqlite3", keep_completions=5)
    ledger.add_completion(completion("voted"))
    vote(ledger, "voted")
    for number in range(29):
        ledger.add_completion(completion(f"c{number}"))
    ledger.add_completion(completion("last")).result()
    assert ledger.get_completion("voted").result().id == "voted"
    assert ledger.get_completion("c28").result().id == "c28"
    with pytest.raises(NotFound):
        ledger.get_completion("c3").result()
    ledger.close()
