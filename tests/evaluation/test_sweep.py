"""The sweep: one encode for all exits, the same answers whatever the batch, killed and resumed equals never killed."""

import copy
import dataclasses
import io
import itertools
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from icet_jax.data.records import Example
from icet_jax.errors import UserError
from icet_jax.evaluation import queue
from icet_jax.evaluation import sweep as sweeping
from icet_jax.evaluation.batching import prompt_tokens
from icet_jax.evaluation.combined import transcript_key
from icet_jax.evaluation.sweep import sweep
from icet_jax.generation import engine
from icet_jax.models.llava.network import Llava
from icet_jax.nn.protocols import init_lora
from icet_jax.parallel.compilations import CompilationCounter, Compiling
from icet_jax.scorers.base import Scores
from icet_jax.scorers.keywords import RefusalKeywords
from tests.evaluation import bundle


class CountingLlava(Llava):
    """Llava that counts, whenever a program runs, the images it encodes and the prompt tokens it processes."""

    images, prompt_tokens = 0, 0

    @classmethod
    def add(cls, images, prompt_tokens):
        cls.images += int(images)
        cls.prompt_tokens += int(prompt_tokens)

    @classmethod
    def counts(cls, run, *args, **kwargs):
        """Returns (result of `run`, images encoded, prompt tokens processed)."""
        cls.images, cls.prompt_tokens = 0, 0
        result = run(*args, **kwargs)
        jax.effects_barrier()
        return result, cls.images, cls.prompt_tokens

    def encode(self, images, upto=None):
        present = images.rows < images.num_rows
        jax.debug.callback(self.add, jnp.sum(present), 0)
        return super().encode(images, upto)

    def prefill(self, tokens, mask, visual=None, prefix=None, lora=None):
        jax.debug.callback(self.add, 0, jnp.sum(mask))
        return super().prefill(tokens, mask, visual, prefix, lora)


class Lengths:
    """A scorer that fails on every third text it is given and labels the rest."""

    name, metric, label_shares = "toy", "tr", {"long": "longwinded"}

    def __init__(self):
        self.calls = 0

    def __call__(self, prompts, responses):
        self.calls += 1
        values = np.array([len(p) for p in prompts], np.float32)
        values[::3] = np.nan
        return {"toy": Scores(values, [None if np.isnan(v) else "long" if v > 6 else "brief" for v in values])}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return bundle.tiny_vlm(tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def counting(vlm):
    """The same model, as a `CountingLlava`."""
    model = nnx.merge(vlm.graphdef, vlm.params)
    model.__class__ = CountingLlava
    graphdef, params = nnx.split(model)
    other = vlm.with_weights(params)
    other.graphdef = graphdef
    return other


def run(vlm, **changes):
    settings = dict(exits="all", sampling=vlm.sampling(6), scorers=[RefusalKeywords()], batch_size=3)
    return sweep(vlm, changes.pop("rows", bundle.rows()), **(settings | changes))


@pytest.fixture(scope="module")
def plain(vlm):
    return run(vlm)


def texts(result):
    return {(row["id"], row["layer"]): row["response"] for row in result.rows}


def test_answers_are_those_of_one_row_at_one_exit(vlm, plain):
    for example in bundle.rows():
        inputs = vlm.processor(images=[list(example.images)], prompts=[example.prompt], pad_to=72)
        encoded = vlm.encode(inputs)
        for layer in range(1, 5):
            alone = vlm.generate(inputs, exit_layer=layer, max_new_tokens=6, encoded=encoded)
            assert texts(plain)[example.id, layer] == alone.texts[0]
    assert len(set(texts(plain).values())) > 10


def test_result_has_the_form_of_the_run_directory(plain):
    table = plain.sweep
    assert table["schema"] == 1 and table["kind"] == "mixed"
    assert (table["num_exits"], table["default_exit"]) == (4, 3)
    assert [layer["layer"] for layer in table["layers"]] == [1, 2, 3, 4]
    assert set(table["groups"]) == {"early", "middle", "late", "average"}
    assert all(layer["n"] == 7 for layer in table["layers"])
    metrics = table["layers"][0]["metrics"]
    assert metrics["asr/refusal_keywords"]["n"] == 3
    assert metrics["refusal/refusal_keywords"]["n"] == 4
    assert metrics["accuracy/vqa_exact"]["n"] == metrics["accuracy/benign_exact"]["n"] == 1
    assert {"length", "empty", "truncated", "degenerate/text_rules"} <= set(metrics)
    json.dumps(table, allow_nan=False)
    assert [(row["id"], row["layer"]) for row in plain.rows[:5]] == [("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 1)]
    assert plain.tokens == sum(row["scores"]["length"] for row in plain.rows)


class Counted:
    """An image in memory that counts how often its bytes are asked for."""

    def __init__(self, pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        self.name, self.content, self.reads = "counted", file.getvalue(), 0

    def read(self):
        self.reads += 1
        return self.content


def test_each_image_is_opened_once(vlm, plain):
    rows = [dataclasses.replace(row, images=tuple(map(Counted, row.images))) for row in bundle.rows()]
    assert texts(run(vlm, rows=rows)) == texts(plain)
    assert [image.reads for row in rows for image in row.images] == [1] * 7


@pytest.mark.parametrize("batch_size", [1, 9])
def test_batching_does_not_change_an_answer(vlm, plain, batch_size):
    assert texts(run(vlm, batch_size=batch_size)) == texts(plain)


def test_sampled_answers_depend_on_seed_and_row_alone(vlm):
    sampling = vlm.sampling(6, temperature=1.0)
    first = texts(run(vlm, sampling=sampling, exits=[2], seed=5))
    assert texts(run(vlm, sampling=sampling, exits=[4, 2], seed=5)).items() >= first.items()
    assert texts(run(vlm, sampling=sampling, exits=[2], seed=6)) != first
    doubled = [*bundle.rows(), Example("again", "short", (bundle.picture(0),))]
    again = texts(run(vlm, sampling=sampling, exits=[2], seed=5, rows=doubled))
    assert again.items() >= first.items() and again["again", 2] != again["a", 2]


def test_attempts_at_forbidden_rows(vlm, tmp_path):
    """Three answers of each forbidden row: the first as without attempts, the others drawn anew, on any batch size."""
    sampling, once, thrice = vlm.sampling(6, temperature=1.0), tmp_path / "once.jsonl", tmp_path / "thrice.jsonl"
    single = run(vlm, sampling=sampling, exits=[2, 4], seed=5, transcript_path=once)
    several = run(vlm, sampling=sampling, exits=[2, 4], seed=5, attempts=3, transcript_path=thrice)

    places = [transcript_key(row) for row in several.rows]
    assert places == [
        (row.id, layer, attempt)
        for row in bundle.rows()
        for layer in (2, 4)
        for attempt in range(3 if row.kind == "forbidden" else 1)
    ]
    assert [row for row in several.rows if "attempt" not in row] == single.rows
    answers = {place: row["response"] for place, row in zip(places, several.rows, strict=True)}
    for row in "abf":
        assert len({answers[row, 2, attempt] for attempt in range(3)}) == 3
    alone = run(vlm, sampling=sampling, exits=[2], seed=5, attempts=3, batch_size=1)
    assert all(answers[transcript_key(row)] == row["response"] for row in alone.rows)

    table = several.sweep
    assert table["generation"]["attempts"] == 3 and [layer["n"] for layer in table["layers"]] == [13, 13]
    metrics = table["layers"][0]["metrics"]
    assert (metrics["asr/refusal_keywords"]["n"], metrics["asr@3/refusal_keywords"]["n"]) == (9, 3)
    assert metrics["refusal/refusal_keywords"]["n"] == 4
    assert list(table["any_exit"]) == ["asr_any@3/refusal_keywords"]

    # A sweep of one attempt, cut off in its last line, goes on with three.
    once.write_bytes(once.read_bytes()[:-20])
    seen = []
    resumed = run(
        vlm, sampling=sampling, exits=[2, 4], seed=5, attempts=3, transcript_path=once, progress=seen.append
    )  # fmt: skip
    assert once.read_bytes() == thrice.read_bytes() and resumed.sweep == table
    assert several.tokens - single.tokens <= resumed.tokens < several.tokens
    assert 13 < seen[0].done <= 16 and seen[-1].done == seen[-1].total == 26


def test_attempts_encode_no_image_again(counting):
    sampling = counting.sampling(6, temperature=1.0)
    for attempts in (1, 3):
        _, images, _ = CountingLlava.counts(run, counting, sampling=sampling, exits=[2, 4], attempts=attempts)
        assert images == 7


def common_beginning(vlm, rows):
    """The number of tokens that all prompts begin with."""
    prompts = vlm.processor.token_ids([list(row.images) for row in rows], [row.prompt for row in rows])
    return next(place for place, tokens in enumerate(zip(*prompts, strict=False)) if len({*map(int, tokens)}) > 1)


def test_attempts_share_what_rows_about_one_image_begin_with(counting, tmp_path):
    picture = tmp_path / "a.png"
    Image.fromarray(bundle.picture(1)).save(picture)
    rows = [Example(str(n), text, (picture,)) for n, text in enumerate(["short", "what is it?"])]
    apart = [dataclasses.replace(row, images=(bundle.picture(1),)) for row in rows]
    settings = dict(sampling=counting.sampling(6, temperature=1.0), exits=[2, 4], attempts=2)
    expected, _, every_token = CountingLlava.counts(run, counting, rows=apart, **settings)
    shared, _, tokens = CountingLlava.counts(run, counting, rows=rows, **settings)
    responses = [{transcript_key(row): row["response"] for row in result.rows} for result in (expected, shared)]
    assert responses[0] == responses[1] and len(responses[0]) == 8
    beginning = common_beginning(counting, rows)
    # 2 rows, 2 attempts and 2 exits: the beginning is processed once for each exit.
    assert every_token - tokens == (2 * 2 - 1) * 2 * beginning


def test_keys_of_attempts_differ_and_the_first_is_the_rows_own():
    key = jax.random.key(7)
    keys = np.asarray(jax.random.key_data(sweeping.answer_keys(key, 5, 4)))
    assert len({tuple(one) for one in keys.reshape(20, -1).tolist()}) == 20
    np.testing.assert_array_equal(keys[:2], jax.random.key_data(sweeping.answer_keys(key, 5, 2)))
    rows = [jax.random.key_data(jax.random.fold_in(key, row)) for row in range(5)]
    np.testing.assert_array_equal(keys[0], rows)


def test_each_image_is_encoded_once_and_an_exit_compiles_nothing(counting):
    compiled = []
    for exits in ([1, 2, 3], [2, 3, 4]):
        _, images, _ = CountingLlava.counts(run, counting, exits=exits)
        assert images == 7
        compiled.append((engine.fill._cache_size(), engine.decode._cache_size()))
    assert compiled[0] == compiled[1]


def test_programs_are_compiled_before_they_are_needed(tmp_path, monkeypatch):
    """Decoding, and one program for each length that prompts are padded to; then no more."""
    monkeypatch.setattr(queue, "_MIN_REQUESTS", 1)
    vlm, names = bundle.tiny_vlm(tmp_path), []
    jax.clear_caches()
    with CompilationCounter() as plain:
        run(vlm, exits=[2])
    jax.clear_caches()
    with CompilationCounter() as ahead:
        result = run(vlm, exits=[2], compile_ahead=compiling(names))
    assert names == ["decode", "prompts of 32", "prompts of 48", "prompts of 64"]
    assert abs(ahead.count - plain.count) <= 2, "what was compiled ahead was not compiled again"
    assert texts(result) == texts(run(vlm, exits=[2]))


def compiling(names, change=lambda name, lowered: lowered):
    """A `CompileAhead` that appends the names of the programs to a list."""

    def compile_ahead(programs):
        programs = [(name, change(name, lowered)) for name, lowered in programs]
        names.extend(name for name, _ in programs)
        return Compiling(programs)

    return compile_ahead


def test_prompts_of_rare_lengths_take_the_program_of_longer_ones(vlm, plain):
    names = []
    assert texts(run(vlm, compile_ahead=compiling(names))) == texts(plain)
    assert names == ["decode", "prompts of 64"]


def test_first_answers_do_not_wait_for_the_programs_of_longer_prompts(vlm, plain, monkeypatch):
    monkeypatch.setattr(queue, "_MIN_REQUESTS", 1)
    answered = threading.Event()

    class Late:
        def __init__(self, lowered):
            self.lowered = lowered

        def compile(self):
            assert answered.wait(60), "the first answers wait for this program"
            return self.lowered.compile()

    ahead = compiling([], lambda name, lowered: Late(lowered) if name == "prompts of 64" else lowered)
    rows, exits = bundle.rows(), range(1, 5)
    todo = {row: [(layer, 0) for layer in exits] for row in range(len(rows))}
    keys = sweeping.answer_keys(jax.random.key(0), len(rows), 1)
    answers = queue.Queue(vlm, rows, keys, todo, vlm.sampling(6), 3, ahead).answers()
    responses = next(answers)
    answered.set()
    responses = [*responses, *itertools.chain.from_iterable(answers)]
    found = {}
    for response in responses:
        row, layer, _ = response.tag
        found[rows[row].id, layer] = sweeping.read_answer(response, vlm, vlm.sampling(6), rows[row].id).text
    assert found == texts(plain)


def test_rows_about_one_image_share_what_they_begin_with(vlm, counting, tmp_path):
    """Three questions about the same file: the same answers as about copies of it, and one beginning for each exit."""
    pictures = [tmp_path / f"{name}.png" for name in "abc"]
    for path in pictures:
        Image.fromarray(bundle.picture(1)).save(path)
    questions = ["short", "something longer than that", "what is it?"]
    apart = [Example(str(n), text, (pictures[n],)) for n, text in enumerate(questions)]
    together = [Example(str(n), text, (pictures[0],)) for n, text in enumerate(questions)]
    unshared, _, every_token = CountingLlava.counts(run, counting, rows=apart, batch_size=4)
    shared, _, tokens = CountingLlava.counts(run, counting, rows=together, batch_size=4)
    expected = texts(unshared)
    assert texts(shared) == expected and len(set(expected.values())) > 4
    # 3 rows and 4 exits: the beginning is processed once for each exit.
    assert every_token - tokens == (3 - 1) * 4 * common_beginning(counting, together)

    part = tmp_path / "part.jsonl"

    def kill(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(vlm, rows=together, batch_size=2, transcript_path=part, progress=kill)
    done = len(part.read_text().splitlines())
    assert texts(run(vlm, rows=together, batch_size=2, transcript_path=part)) == expected and 0 < done < 24


def test_adapters_change_the_answers(vlm, plain):
    adapters = init_lora(vlm.config.lora_shapes(), rank=2, alpha=4.0, targets=("q_proj",), key=jax.random.key(0))
    assert texts(run(vlm.with_weights(vlm.params, adapters))) == texts(plain)
    noisy = adapters.replace(weights=jax.tree.map(lambda leaf: leaf + 1.0, adapters.weights))
    assert texts(run(vlm.with_weights(vlm.params, noisy))) != texts(plain)


def test_scorers_errors_and_labels(vlm):
    result = run(vlm, scorers=[Lengths(), RefusalKeywords()], exits=[2], batch_size=7)
    metrics = result.sweep["layers"][0]["metrics"]
    assert metrics["tr/toy"]["n"] == 4 and metrics["tr/toy"]["n_error"] == 3
    assert metrics["longwinded/toy"]["n"] == 4 and metrics["longwinded/toy"]["n_error"] == 3
    failed = [row for row in result.rows if row["scores"]["tr/toy"] is None]
    assert len(failed) == 3 and all("tr/toy" not in row["labels"] for row in failed)


def test_killed_and_resumed_equals_never_killed(vlm, tmp_path):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    expected = run(vlm, transcript_path=whole)

    class Killed(Exception):
        pass

    def kill(progress):
        if progress.done >= 12:
            raise Killed

    with pytest.raises(Killed):
        run(vlm, transcript_path=part, progress=kill)
    part.write_bytes(part.read_bytes()[:-20])
    seen = []
    scorer = Lengths()
    resumed = run(vlm, transcript_path=part, progress=seen.append)
    assert part.read_bytes() == whole.read_bytes()
    assert resumed.sweep == expected.sweep and resumed.rows == expected.rows
    assert 11 < seen[0].done <= 15 and seen[-1].done == seen[-1].total == 28
    assert seen[0].seconds_left is None and seen[-1].seconds_left == 0 and seen[-1].tokens_per_second > 0
    again = run(vlm, transcript_path=part)
    assert again.tokens == 0 and again.rows == expected.rows and scorer.calls == 0


class Failing:
    """A judge that breaks down at its third batch, or cannot score long prompts, or is well."""

    name, metric, fingerprint = "toy", "tr", "first weights"

    def __init__(self, trouble=""):
        self.calls, self.trouble = 0, trouble

    def __call__(self, prompts, responses):
        if self.trouble == "broken" and self.calls == 2:
            raise ConnectionError("the judge is away")
        self.calls += 1
        values = [np.nan if self.trouble == "long" and len(prompt) > 6 else len(prompt) for prompt in prompts]
        return {"toy": Scores(np.array(values, np.float32), [None] * len(prompts))}


def test_a_judge_that_breaks_down_loses_no_answer(vlm, counting, tmp_path):
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    expected = run(vlm, transcript_path=whole, exits=[2, 3], scorers=[Failing()])
    with pytest.raises(ConnectionError):
        run(vlm, transcript_path=part, exits=[2, 3], scorers=[Failing("broken")])
    lines = list(map(json.loads, part.read_text().splitlines()))
    judged = {(line["id"], line["layer"]) for line in lines if line["judges"] is not None}
    assert len({(line["id"], line["layer"]) for line in lines} - judged) > 2
    resumed = run(vlm, transcript_path=part, exits=[2, 3], scorers=[Failing()])
    assert part.read_bytes() == whole.read_bytes() and resumed.sweep == expected.sweep
    assert resumed.tokens < expected.tokens / 2 + 10

    judged = Failing()
    judged.fingerprint = "second weights"
    again, *work = CountingLlava.counts(run, counting, transcript_path=part, exits=[2, 3], scorers=[judged])
    assert judged.calls == 5 and again.rows == expected.rows
    assert (again.tokens, work) == (0, [0, 0]), "another judge generates nothing"
    assert run(vlm, transcript_path=part, exits=[2, 3], scorers=[judged]).rows == expected.rows and judged.calls == 5

    path = tmp_path / "failed.jsonl"
    path.write_bytes(part.read_bytes())
    failed = run(vlm, transcript_path=path, exits=[2, 3], scorers=[Failing("long")])
    assert failed.sweep["layers"][0]["metrics"]["tr/toy"]["n_error"] == 3
    well = Failing()
    assert run(vlm, transcript_path=path, exits=[2, 3], scorers=[well]).sweep == expected.sweep
    assert 0 < well.calls < 5  # only batches with an error are judged again


def test_foreign_transcripts_are_refused(vlm, tmp_path):
    path = tmp_path / "rows.jsonl"
    run(vlm, transcript_path=path, exits=[1])
    with pytest.raises(UserError, match="another sweep"):
        run(vlm, transcript_path=path, exits=[1], tag="after")
    with pytest.raises(UserError, match="another sweep"):
        run(vlm, transcript_path=path, exits=[1], rows=[Example("a", "other", (bundle.picture(0),))])
    path.write_text('{"id": 1}\n')
    with pytest.raises(UserError, match="line 1 is no transcript row"):
        run(vlm, transcript_path=path)


def with_nan(vlm, part):
    """The same model with NaN in the last of the stacked layers whose paths hold `part`."""

    def damage(path, leaf):
        return leaf.at[-1].set(jnp.nan) if part in jax.tree_util.keystr(path) else leaf

    return vlm.with_weights(jax.tree_util.tree_map_with_path(damage, vlm.params))


def test_a_damaged_model_is_no_unsafe_model(vlm):
    with pytest.raises(UserError, match="^exit 1, row a: the model's logits are NaN or infinite; the checkpoint is"):
        run(with_nan(vlm, "['language_model']['layers']"), exits=[1, 2], rows=bundle.rows()[:1])


def test_one_damaged_exit_is_named_and_the_answers_before_it_are_kept(vlm, tmp_path):
    damaged, path = with_nan(vlm, "['vision_tower']['layers']"), tmp_path / "before.jsonl"
    sound = run(damaged, exits=[1, 2, 3], transcript_path=path)
    assert texts(sound) == {place: text for place, text in texts(run(vlm)).items() if place[1] < 4}
    with pytest.raises(UserError, match="^exit 4, row [abcefg]: .*NaN or infinite"):
        run(damaged, transcript_path=path)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["layer"] for row in kept if row["id"] != "d"} == {1, 2, 3}


def test_a_prompt_and_answer_longer_than_the_model_takes_is_one_line(vlm):
    small = copy.copy(vlm)
    small.max_positions = max(map(len, prompt_tokens(vlm.processor, bundle.rows()))) + 5
    says = rf"^row \S+: the prompt takes \d+ positions, .* up to 6 .* but the model has {small.max_positions} \(config"
    with pytest.raises(UserError, match=says):
        run(small)


def test_bad_input_is_one_line(vlm):
    with pytest.raises(UserError, match="exit 5"):
        run(vlm, exits=[1, 5])
    with pytest.raises(UserError, match="no rows"):
        run(vlm, rows=[])
    with pytest.raises(UserError, match="sweep of data: attempts=2; .* temperature above 0"):
        run(vlm, attempts=2)
    with pytest.raises(UserError, match="attempts=0; give 1"):
        run(vlm, attempts=0, sampling=vlm.sampling(6, temperature=1.0))
    with pytest.raises(UserError, match="repeat an id"):
        run(vlm, rows=[Example("a", "x"), Example("a", "y")])
