"""The embedded model: its files, the corpus it is trained on, and a slice of the exam."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from millrace.runtime.assets.grist import corpus, evaluate, model, skills, start, stories, text, train

FOLDER = Path(evaluate.__file__).parent
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors",
    "MODEL_CARD.md",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


@pytest.fixture(scope="module")
def examiner() -> evaluate.Examiner:
    return evaluate.Examiner(FOLDER)


def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    jinja2 = pytest.importorskip("jinja2.sandbox")
    config = json.loads((FOLDER / "tokenizer_config.json").read_text())
    template = jinja2.ImmutableSandboxedEnvironment().from_string(config["chat_template"])
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


# -- the checkpoint ----------------------------------------------------------------------------------------------------


def test_files_are_there_and_small():
    assert [name for name in FILES if not (FOLDER / name).is_file()] == []
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000


def test_config_is_a_grouped_query_llama():
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert (
        config["head_dim"] in (32, 64) and config["tie_word_embeddings"] and config["max_position_embeddings"] == 2048
    )


def test_config_is_what_the_recipe_writes():
    assert json.loads((FOLDER / "config.json").read_text()) == model.Shape().config()


def test_weights_are_bf16_and_complete():
    from safetensors.torch import load_file

    weights = load_file(FOLDER / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert weights.keys() == model.Grist(model.Shape()).state_dict().keys()


def test_special_tokens_and_digits_are_single_tokens(tokenizer):
    assert [tokenizer.token_to_id(token) for token in model.SPECIAL_TOKENS] == list(range(5))
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.encode("2048").tokens == ["2", "0", "4", "8"]


@pytest.mark.parametrize("sample", ["What is 2 + 2?", "naïve café — 日本語 🦊", "  blanks \n\n and\ttabs ", ""])
def test_tokenizer_round_trip(tokenizer, sample):
    assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


# -- the chat template -------------------------------------------------------------------------------------------------


def test_template_renders_every_role():
    messages = [
        {"role": "system", "content": " Be kind. "},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
    ]
    expected = "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|end|>"
    assert render(messages, add_generation_prompt=False) == expected
    assert render(messages, add_generation_prompt=True) == expected + "<|assistant|>"


def test_template_and_training_agree(tokenizer):
    """The exam and the training rows write token ids by hand; they must be what the template makes."""
    talk = corpus.Conversation("Be kind.", (corpus.Turn("My name is Zob.", "Nice to meet you, Zob!"),))
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "My name is Zob."},
        {"role": "assistant", "content": "Nice to meet you, Zob!"},
    ]
    ((ids, learned),) = text.encode_conversations(tokenizer, [talk])
    assert tokenizer.encode(render(messages, add_generation_prompt=False)).ids == ids
    assert tokenizer.decode([i for i, mark in zip(ids, learned, strict=True) if mark]) == "Nice to meet you, Zob!"
    messages.append({"role": "user", "content": "Who am I?"})
    prompt = text.prompt_ids(tokenizer, list(talk.turns), "Who am I?", "Be kind.")
    assert tokenizer.encode(render(messages, add_generation_prompt=True)).ids == prompt


# -- the corpus and the line between training and exam -----------------------------------------------------------------


def test_corpus_is_decided_by_its_seed():
    def first(seed: int) -> list[corpus.Conversation]:
        return list(itertools.islice(corpus.conversations(seed), 300))

    assert first(7) == first(7)
    assert first(7) != first(8)
    assert corpus.exam() == corpus.exam()
    assert len(corpus.exam()) == 200


def test_held_out_questions_are_not_in_the_training_text():
    tests = corpus.exam()
    questions = {skills.normal_form(test.users[-1]) for test in tests if test.skill != "memory"}
    told = {test.users[0] for test in tests if test.skill == "memory" and "not told me" not in test.expect}
    for conversation in itertools.islice(corpus.conversations(corpus.TRAIN_SEED), 6000):
        for turn in conversation.turns:
            assert skills.normal_form(turn.user) not in questions
            assert turn.user not in told


def test_held_out_sums_are_in_no_reply():
    seen = set()
    for conversation in itertools.islice(corpus.conversations(corpus.TRAIN_SEED), 6000):
        for turn in conversation.turns:
            seen.update(re.findall(r"(\d+) ([-+]) (\d+) = ", turn.reply))
    assert len(seen) > 1000
    for first, sign, second in seen:
        a, b = int(first), int(second)
        low, high = (a, b) if sign == "-" else sorted((a, b))
        assert skills.is_table(sign, a, b) or not skills.held_out(f"{low} {sign} {high}")


def test_sums_are_worked_out_right():
    for a, b in itertools.product(range(100), repeat=2):
        for sign in "+-" if a >= b else "+":
            reply = skills.work_out(sign, a, b)
            assert reply.endswith(f"{a} {sign} {b} = {a + b if sign == '+' else a - b}.")
            for left, right in re.findall(r"([\d +-]+) = (\d+)", reply):
                first, *others = (int(number) for number in re.findall(r"\d+", left))
                assert first + sum(others if sign == "+" else [-number for number in others]) == int(right), reply


def test_the_two_sides_of_the_line_share_no_question():
    for skill in (
        "capitals",
        "opposites",
        "colours",
        "calendar",
        "animals",
        "how-to",
        "identity",
        "smalltalk",
        "unknown",
    ):
        trained = {skills.normal_form(ask.user) for group in skills.listed(skill, held=False) for ask in group}
        held = {skills.normal_form(ask.user) for group in skills.listed(skill, held=True) for ask in group}
        assert held and not trained & held


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What's the capital of France", "Hi! what is the capital of France?"),
        ("I'd like a story, please", "i would like a story."),
        ("What is my favorite color?", "what is my favourite colour"),
    ],
)
def test_spellings_of_a_question_have_one_normal_form(one, other):
    assert skills.normal_form(one) == skills.normal_form(other)


def test_stories_are_five_to_ten_sentences_about_their_topic():
    rng = random.Random(3)
    for topic in stories.TOPICS:
        for short in (False, True):
            story = stories.tell(rng, topic, short).text
            assert topic in story
            assert "{" not in story
            assert " a old" not in story


# -- training ----------------------------------------------------------------------------------------------------------


def test_packed_rows_keep_conversations_apart(tokenizer):
    """Changing one conversation of a row leaves the states of the others as they were."""
    torch.manual_seed(0)
    shape = model.Shape(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
    small = model.Grist(shape).eval()
    ids, learned, number = train.Batches(tokenizer, seed=1).packed(rows=2)
    mask = ((number[:, :, None] == number[:, None, :]) & torch.ones(train.ROW, train.ROW).tril().bool())[:, None]
    with torch.no_grad():
        before = small.hidden(ids, mask)
        changed = torch.where(number == 0, 7, ids)
        after = small.hidden(changed, mask)
    kept = number > 0
    assert kept.any() and learned.any()
    torch.testing.assert_close(after[kept], before[kept])
    assert not torch.allclose(after[number == 0], before[number == 0])


def test_fresh_model_already_copies_names(tokenizer):
    """What `start` builds in: with random weights alone the loss would be that of guessing, ln(4096) = 8.3, or more."""
    torch.manual_seed(0)
    fresh = model.Grist(model.Shape())
    start.initialise(fresh, seed=1)
    supply = train.Batches(tokenizer, seed=1)
    rows = [supply.drill() for _ in range(4)]
    ids, learned, number = (torch.stack(parts) for parts in zip(*rows, strict=True))
    with torch.no_grad():
        copying = train.loss_of(fresh, (ids, learned, number)).item()
    assert copying < 7.0


def test_orthogonal_brings_singular_values_near_one():
    for shape in ((3, 64, 192), (2, 192, 64)):
        values = torch.linalg.svdvals(train.orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
        assert values.min() > 0.5 and values.max() < 1.5


def test_rate_rises_stays_and_falls_to_zero():
    assert train.rate_at(0.01) == 0.5
    assert train.rate_at(0.3) == 1.0
    assert 0 < train.rate_at(0.99) < 0.03
    assert train.rate_at(1.0) == 0.0


# -- what it says ------------------------------------------------------------------------------------------------------


def test_contains_wants_whole_words():
    assert evaluate.contains("The capital of France is Paris.", "paris")
    assert evaluate.contains("8 + 5 = 13.", "= 13.")
    assert not evaluate.contains("They are parishes.", "paris")
    assert not evaluate.contains("8 + 5 = 130.", "= 13.")


def test_cached_generation_equals_full_recomputation(examiner):
    ids = text.prompt_ids(examiner._tokenizer, [], "What is the capital of France?")
    new, _ = examiner._model.generate(ids, 8)
    with torch.no_grad():
        for i in range(len(new)):
            states = examiner._model.hidden(torch.tensor([ids + new[:i]]))
            assert int(examiner._model.logits(states[0, -1]).argmax()) == new[i]


@pytest.mark.slow
def test_a_slice_of_the_exam_is_right(examiner):
    outcomes = examiner.examine(corpus.exam()[::6])
    wrong = [(outcome.test.users, outcome.reply) for outcome in outcomes if not outcome.right]
    assert len(outcomes) == 34
    assert len(wrong) <= 0.2 * len(outcomes), wrong


@pytest.mark.slow
def test_transformers_loads_the_folder_and_agrees(examiner):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    ids = text.prompt_ids(examiner._tokenizer, [], "What is the capital of France?", "You are a helpful assistant.")
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits
        ours = examiner._model.logits(examiner._model.hidden(torch.tensor([ids])))
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)
    new, ended = examiner._model.generate(ids, 32)
    assert ended
    assert theirs.generate(torch.tensor([ids]), max_new_tokens=32)[0, len(ids) :].tolist() == [*new, model.END]
