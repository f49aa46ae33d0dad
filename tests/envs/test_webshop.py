from __future__ import annotations

import gzip
import json
import os
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pz_envs.checks import check_env
from pz_envs.datasets import find_file
from pz_envs.errors import ConfigError, DataError, EnvError
from pz_envs.seeding import generator
from pz_envs.webshop import catalogue
from pz_envs.webshop.env import SEARCH_PLACEHOLDER, WebShopEnv
from pz_envs.webshop.expert import rule_agent
from pz_envs.webshop.goals import Goal, draw_like_original, split_range
from pz_envs.webshop.products import parse_options, parse_pricing
from pz_envs.webshop.reward import normalize_color, score_purchase, token_set_ratio
from pz_envs.webshop.store import open_shop

GOLDEN = (
    Path(os.environ.get("PZ_DATA", "/nonexistent")).parent / "golden" / "webshop_transcripts.tar.xz"
)
needs_golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="needs the golden cases by PZ_DATA")


def _data(name: str) -> Path:
    path = find_file("webshop", name)
    if path is None:
        pytest.skip(f"webshop/{name} is not here")
    return path


def _lines(name: str) -> list[dict[str, Any]]:
    with gzip.open(_data(name), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _record(asin: str, **changes: Any) -> dict[str, Any]:
    return {
        "asin": asin,
        "name": "Blue Mug",
        "category": "garden",
        "query": "Mugs ",
        "product_category": "Home › Kitchen › Mugs",
        "pricing": "$12.50",
        "small_description": ["Holds tea"],
        "full_description": "A mug.",
        "customization_options": None,
        **changes,
    }


def _annotated(asin: str, **changes: Any) -> dict[str, Any]:
    return {
        "asin": asin,
        "instruction": "i want a mug.",
        "instruction_attributes": ["dishwasher safe"],
        "instruction_options": [],
        **changes,
    }


def _folder(path: Path, records: list[Any], people: dict[str, Any], mined: Any = None) -> Path:
    (path / "items_shuffle.json").write_text(json.dumps(records))
    (path / "items_ins_v2.json").write_text(json.dumps(mined or {}))
    (path / "items_human_ins.json").write_text(json.dumps(people))
    return path


@pytest.fixture
def odd_shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shop whose texts try to break pages and URLs."""
    monkeypatch.setenv("PZ_CACHE", str(tmp_path / "cache"))
    odd = _record(
        "B000000001",
        name='Mug <b>&amp; "tea"</b>',
        pricing="$5 - $9",
        small_description=["", " ", "\n ", "one"],
        full_description="",
        customization_options={
            "Color": [{"value": " Blau/Weiß "}, {"value": "color"}, {"value": "red"}],
            "Größe": None,
            "Size": [{"value": "red"}, {"value": "Buy Now"}, {"value": "it's <big>"}],
        },
    )
    records = [odd, _record("B000000002"), _record("B000000001"), _record("nan")]
    return _folder(
        tmp_path,
        [*records, _record("B0000000003")],
        {"B000000001": [_annotated("B000000001", instruction_options=["red"])]},
    )


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(folder, filter="data")
    return folder / "webshop_plain"


@needs_golden
@pytest.mark.data
@pytest.mark.parametrize(
    ("mode", "kind"),
    [("text_rich", "human"), ("text", "human"), ("url", "human"), ("text_rich", "synthetic")],
)
def test_transcripts_of_the_original_replay_without_a_difference(
    golden: Path, mode: Any, kind: Any
) -> None:
    transcript = json.loads((golden / f"transcript_{mode}_{kind}.json").read_text())
    env = WebShopEnv(
        source=str(golden), goals=kind, observation_mode=mode, split="all", price_seed=5
    )
    shop = open_shop(str(golden), None)
    goals, prices = shop.goals(kind, 5)
    assert prices == transcript["prices"]
    assert shop.nouns == "given"
    steps = 0
    for index, episode in enumerate(transcript["ep"]):
        _assert_goal(goals[index], episode["goal"])
        first, *others = episode["steps"]
        observation, _ = env.reset(options={"index": index})
        assert observation == first["ob"]
        for step in others:
            page = env._session.page
            shown = {"has_search_bar": page.has_search_bar, "clickables": list(page.clickables)}
            assert shown == step["av"]
            observation, reward, done, _, info = env.step(step["a"])
            assert (observation, reward, done) == (step["ob"], step["r"], step["d"])
            assert info["extra"]["url"] == step["url"]
            assert info["extra"].get("verdict") == step["info"]
            steps += 1
    assert steps > 100


def _assert_goal(goal: Goal, expected: dict[str, Any]) -> None:
    options = goal.options if isinstance(goal.options, dict) else list(goal.options)
    assert options == expected["goal_options"]
    assert list(goal.attributes) == expected["attributes"]
    for key in ("asin", "category", "query", "name", "product_category", "instruction_text"):
        assert getattr(goal, key) == expected[key]
    assert (goal.price_upper, goal.weight) == (expected["price_upper"], expected["weight"])


@pytest.mark.data
def test_the_published_shop_has_the_originals_goals_and_rewards() -> None:
    expected = _lines("synthetic_goals_6910_noprice.jsonl.gz")
    shop = open_shop("products_1000", None)
    order = list(range(len(expected)))
    random.Random(233).shuffle(order)
    made = shop.goals("synthetic", 1)[0]
    assert len(made) == len(expected) == 6910
    goals = {place: goal for place, goal in zip(order, made, strict=True)}
    for place, row in enumerate(expected):
        goal = goals[place]
        text = goal.instruction_text.split(", and price lower than")[0]
        assert (goal.asin, text) == (row["asin"], row["instruction_text_no_price"])
        assert (list(goal.attributes), goal.options) == (row["attributes"], row["goal_options"])
        assert abs(goal.weight - row["weight"]) < 1e-14
    for record in _lines("products_1000.jsonl.gz"):
        assert shop.products[record["asin"]].price_text == record["Price"]
        again = parse_options(record["customization_options"] or None)
        assert again == shop.products[record["asin"]].options
    vectors = json.loads(gzip.decompress(_data("reward_vectors.json.gz").read_bytes()))
    assert len(vectors) == 400
    for vector in vectors:
        _assert_vector(shop.products, goals[vector["goal"]], vector)


def _assert_vector(products: Any, goal: Goal, vector: dict[str, Any]) -> None:
    bounded = replace(goal, price_upper=vector["price_upper"])
    bought = products[vector["buy_asin"]]
    assert goal.asin == vector["goal_asin"]
    verdict = score_purchase(bought, bounded, vector["price"], vector["options"])
    parts = verdict.parts
    assert parts["r_att"] == vector["r_att"]
    assert round(parts["r_att"] * len(goal.attributes)) == vector["num_attr"]
    assert parts.get("r_option", 0.0) == (vector["r_option"] or 0.0)
    for key in ("r_price", "query_match", "category_match"):
        assert parts[key] == vector[key]
    base = vector["base_reward_before_r_type"]
    assert verdict.reward == pytest.approx(base * parts["r_type"], abs=1e-15)


@pytest.mark.data
def test_the_oracle_buys_what_the_real_goals_ask_for() -> None:
    _data("products_1000.jsonl.gz")
    env = WebShopEnv(source="products_1000", goals="synthetic", split="all")
    scores = [_play(env, index, "oracle")["score"] for index in range(0, 6910, 20)]
    assert np.mean(scores) > 0.98
    assert min(scores) > 0.4
    people = WebShopEnv(source="products_1000", split="all")
    assert all(_play(people, index, "oracle")["success"] for index in range(13))


def _play(env: WebShopEnv, index: int, policy: str) -> dict[str, Any]:
    observation, info = env.reset(options={"index": index})
    rng = generator("webshop test", index)
    for _ in range(15):
        if policy == "oracle":
            action = env.expert_action()
        elif policy == "rule":
            action = rule_agent(observation, info)
        else:
            action = env.random_action(rng)
        assert action is not None
        observation, _, over, _, info = env.step(action)
        if over:
            assert env.expert_action() is None
            break
    return info


def test_the_environment_obeys_the_contract() -> None:
    report = check_env(WebShopEnv)
    assert {"going back", "fuzzed replies", "expert", "random action"} <= set(report.passed)
    check_env(lambda: WebShopEnv(goals="synthetic", num_prev_obs=1, num_prev_actions=2))


@pytest.mark.parametrize("kind", ["human", "synthetic"])
def test_on_the_built_in_catalogue_reading_pays_and_the_oracle_always_succeeds(kind: Any) -> None:
    env = WebShopEnv(split="all", goals=kind)
    means = {
        policy: np.mean([_play(env, index, policy)["score"] for index in range(0, 10_000, 100)])
        for policy in ("random", "rule", "oracle")
    }
    assert means["oracle"] == 1.0
    assert means["random"] < 0.3
    if kind == "human":
        assert means["random"] < means["rule"] < 0.8


def test_a_smaller_catalogue_is_the_beginning_of_a_larger_one() -> None:
    rows = list(catalogue.generate(40))
    assert rows == list(catalogue.generate(90))[:40]
    assert all(people[0]["asin"] == record["asin"] for record, _, people in rows)
    assert len({record["asin"] for record, _, _ in rows}) == 40
    for size in (-1, catalogue.LARGEST + 1):
        with pytest.raises(ConfigError, match="1 to"):
            catalogue.check_size(size)


@pytest.mark.parametrize(
    ("action", "url"),
    [
        ("search[Blue  Mug]", "/search_results/0/blue++mug/1"),
        ("x search[mug]", None),
        *(("search[]", None), ("search mug", None), ("search[a] [mug]", None)),
        *(("click[search]", None), ("click[buy now]", None), ("buy now", None)),
    ],
)
def test_only_well_formed_actions_change_anything(
    odd_shop: Path, action: str, url: str | None
) -> None:
    env = WebShopEnv(source=str(odd_shop), split="all")
    before, _ = env.reset(options={"index": 0})
    after, reward, terminated, _, info = env.step(action)
    assert (reward, terminated) == (0.0, False)
    assert info["valid"] == (url is not None)
    assert (after == before) == (url is None)
    assert info["extra"]["url"] == f"http://127.0.0.1:3000{url or '/0'}"


def test_hostile_products_are_shown_as_the_original_shows_them(odd_shop: Path) -> None:
    env = WebShopEnv(source=str(odd_shop), split="all")
    _, info = env.reset(options={"index": 0})
    assert info["admissible_commands"] == (SEARCH_PLACEHOLDER,)
    observation, _, _, _, info = env.step("search[mug]")
    assert "Page 1 (Total results: 2)\n[button] Next > [button_]\n" in observation
    assert (
        '\n\n[button] B000000001 [button_]\nMug <b>&amp; "tea"</b>\n$5.0 to $9.0\n' in observation
    )
    observation, _, _, _, info = env.step("click[b000000001]")
    # An option spelled like an option name is shown as chosen as soon as any is; see the URL.
    assert "  [button] blau | weiß [button_]\n  [button] color [button_]\n" in observation
    assert info["extra"]["url"].endswith("/item_page/0/B000000001/mug/1/{}")
    observation, _, _, _, info = env.step("click[blau | weiß]")
    assert (
        "  [button] blau | weiß [button_]\n  [clicked button] color [clicked button_]"
        in observation
    )
    assert observation.startswith("You have clicked color.\nInstruction:\n")
    assert info["extra"]["url"].endswith('{"color": "blau | wei\\u00df"}')
    observation, _, _, _, info = env.step("click[red]")
    assert info["extra"]["url"].endswith('{"color": "blau | wei\\u00df", "size": "red"}')
    observation, _, _, _, info = env.step("click[features]")
    assert observation.endswith("[button] < Prev [button_]\n \n \n one\n")
    assert info["extra"]["url"].endswith("/Features/{'color': 'blau | weiß', 'size': 'red'}")
    observation, _, _, _, _ = env.step("click[< prev]")
    assert observation.startswith("You have clicked red.\n")
    env.step("click[it's <big>]")
    observation, reward, terminated, _, info = env.step("click[buy now]")
    assert terminated
    assert '{"color": "blau | wei\\u00df", "size": "it\\u0027s \\u003cbig\\u003e"}' in observation
    assert f"\n{reward}\nReward Details \nNone\n" in observation
    assert info["extra"]["verdict"]["r_option"] == 0.0
    assert info["admissible_commands"] == ()
    with pytest.raises(EnvError, match="over"):
        env.step("search[mug]")


def test_going_back_keeps_or_clears_what_the_original_keeps_or_clears(odd_shop: Path) -> None:
    env = WebShopEnv(source=str(odd_shop), split="all", show_attributes=True)
    env.reset(options={"index": 0})
    for action in ("search[mug]", "click[b000000001]", "click[color]", "click[attributes]"):
        observation = env.step(action)[0]
    assert observation.endswith(" DUMMY_ATTR\ngarden\nmugs\nHome › Kitchen › Mugs\n")
    observation = env.step("click[< prev]")[0]
    assert "[clicked button] color [clicked button_]" in observation
    observation = env.step("click[< prev]")[0]
    assert "[clicked button] B000000001 [clicked button_]" in observation
    assert env.step("click[b000000001]")[4]["extra"]["url"].endswith("/{}")
    env.step("click[back to search]")
    assert "[clicked button] B000000001" not in env.step("search[mug]")[0]
    assert "Page 2 (Total results: 2)\n[button] < Prev" in env.step("click[next >]")[0]
    env.step("click[next >]")
    assert "B00" not in env.step("click[< prev]")[0]
    assert "B000000002" in env.step("click[< prev]")[0]


def test_the_placeholder_sent_as_it_is_searches_for_the_goal() -> None:
    env = WebShopEnv()
    _, info = env.reset(seed=3)
    assert info["admissible_commands"] == (SEARCH_PLACEHOLDER,)
    _, _, _, _, info = env.step(SEARCH_PLACEHOLDER)
    assert info["valid"]
    assert info["extra"]["page"] == "results"
    assert len(info["admissible_commands"]) > 10
    assert WebShopEnv(admissible_commands=False).reset(seed=3)[1]["admissible_commands"] is None


def test_history_comes_oldest_first(odd_shop: Path) -> None:
    env = WebShopEnv(
        source=str(odd_shop),
        split="all",
        observation_mode="url",
        num_prev_obs=2,
        num_prev_actions=1,
    )
    start, _ = env.reset(options={"index": 0})
    results = "http://127.0.0.1:3000/search_results/0/mug/1"
    item = "http://127.0.0.1:3000/item_page/0/B000000001/mug/1/{}"
    assert env.step("search[mug]")[0] == f"{start} [SEP] search[mug] [SEP] {results}"
    saved = env.snapshot()
    expected = f"{start} [SEP] {results} [SEP] click[b000000001] [SEP] {item}"
    assert env.step("click[b000000001]")[0] == expected
    env.restore(saved)
    assert env.step("click[b000000001]")[0] == expected


def test_a_snapshot_continues_elsewhere_and_only_in_the_same_shop() -> None:
    env = WebShopEnv(goals="synthetic")
    env.reset(seed=11)
    actions = []
    while (action := env.expert_action()) is not None:
        actions.append(action)
        env.step(action)
    assert len(actions) >= 3
    env.reset(seed=11)
    env.step(actions[0])
    env.step(actions[1])
    saved = env.snapshot()
    expected = [env.step(action) for action in actions[2:]]
    other = WebShopEnv(goals="synthetic", split="test")
    other.reset(seed=5)
    other.restore(saved)
    assert [other.step(action) for action in actions[2:]] == expected
    for another in (
        WebShopEnv(),
        WebShopEnv(goals="synthetic", price_seed=1),
        WebShopEnv(goals="synthetic", num_products=50),
    ):
        with pytest.raises(EnvError, match="another shop"):
            another.restore(saved)


def test_a_purchase_is_scored_part_by_part(odd_shop: Path) -> None:
    shop = open_shop(str(odd_shop), None)
    odd, plain = shop.products.values()
    (goal,) = shop.goals("human", 0)[0]
    right = score_purchase(odd, goal, 6.0, {"color": "red"})
    assert right.parts["title_score"] == 4 / 5  # mug, b, amp, tea, b
    assert right.reward == pytest.approx(2 / 3)
    assert right.parts["r_type"] == 1.0
    dear = score_purchase(odd, goal, goal.price_upper + 1, {})
    assert dear.reward == 0.0
    named = replace(plain, bullets=("is Dishwasher SAFE",))
    assert score_purchase(named, goal, 6.0, {"size": "reddish"}).parts["r_att"] == 1.0
    stranger = replace(plain, query="lamps", product_category="Light › Lamps", nouns=("lamp",))
    assert score_purchase(stranger, goal, 6.0, {"color": "red"}).reward == 0.0
    far = replace(stranger, nouns=goal.nouns[:1])
    assert score_purchase(far, _long_title(goal, 4), 6.0, {}).parts["r_type"] == 1.0
    assert score_purchase(far, _long_title(goal, 5), 6.0, {}).parts["r_type"] == 0.5
    assert score_purchase(far, _long_title(goal, 11), 6.0, {}).parts["r_type"] == 0.1


def _long_title(goal: Goal, length: int) -> Goal:
    """Return ``goal`` with a title of ``length`` nouns, the first of them its own."""
    return replace(goal, nouns=(goal.nouns[0], *(f"word{n}" for n in range(length - 1))))


@pytest.mark.parametrize(
    ("left", "right", "ratio"),
    [
        ("red shirt", "shirt red", 100),
        ("machine wash", "machine washable", 86),
        ("tea tree oil", "tea tree", 100),
        ("gluten free", "dairy free", 57),
        ("", "red", 0),
        ("!!!", "!!!", 0),
        ("café", "caf", 100),
        ("Large", "large", 100),
    ],
)
def test_token_set_ratios_are_thefuzz_s(left: str, right: str, ratio: int) -> None:
    assert token_set_ratio(left, right) == ratio


def test_colours_are_found_inside_words_in_alphabetical_order() -> None:
    assert normalize_color("titanium") == "tan"
    assert normalize_color("dark blue") == "blue"
    assert normalize_color("size 9") == "size 9"
    assert normalize_color(("color", "navy")) == "navy"
    assert normalize_color(("color", "navy blue")) == ("color", "navy blue")


@pytest.mark.parametrize(
    ("text", "prices"),
    [
        *(("$9.99", (9.99,)), ("$10", (10.0,)), ("", (100.0,)), (None, (100.0,))),
        *(("$5 - $1,009.50", (5.0, 1009.5)), ("$1 $2 $3", (1.0, 2.0))),
    ],
)
def test_prices_are_read_as_the_original_reads_them(
    text: str | None, prices: tuple[float, ...]
) -> None:
    assert parse_pricing(text) == prices


def test_prices_and_bounds_come_in_load_order_from_one_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PZ_CACHE", str(tmp_path / "cache"))
    mined = {"a": {"instruction": "Find me a mug", "instruction_attributes": ["x"]}}
    sized = {"Size": [{"value": "S"}, {"value": "L"}], "Color": [{"value": "Red"}]}
    records = [
        _record("a", pricing="$5 - $9", customization_options=sized),
        _record("b", pricing="$985"),
    ]
    people = {"b": [_annotated("b"), _annotated("b", instruction_attributes=[])]}
    shop = open_shop(str(_folder(tmp_path, records, people, mined)), None)
    synthetic, prices = shop.goals("synthetic", 4)
    again = random.Random(4)
    assert dict(prices) == {"a": again.uniform(5, 9), "b": 985.0}
    bound = max(again.sample([10.0, 20.0, 30.0, 40.0], 2))
    clause = f", and price lower than {bound:.2f} dollars"
    assert {goal.instruction_text for goal in synthetic} == {
        f"Find me a mug with color: red, and size: {size}{clause}" for size in "sl"
    }
    assert [goal.weight for goal in synthetic] == [0.5, 0.5]
    (human,) = shop.goals("human", 4)[0]
    assert (human.instruction_text, human.price_upper) == ("i want a mug", 1_000_000)


def test_the_faithful_draw_never_takes_goal_0() -> None:
    goals, _ = open_shop("builtin", 30).goals("human", 0)
    sums = np.cumsum(goals.weights(range(len(goals))))
    rng = random.Random(0)
    assert {draw_like_original(sums, rng) for _ in range(2000)} == set(range(1, len(goals)))
    # Weights 1, 0, 3: goal 1 has the weight of goal 0, goal 2 that of goal 1 and what is left.
    drawn = [draw_like_original(np.array([1.0, 1.0, 4.0]), rng) for _ in range(2000)]
    assert drawn.count(1) + drawn.count(2) == 2000
    assert 400 < drawn.count(1) < 600
    env = WebShopEnv(num_products=30, split="all", draw="faithful")
    seen = {env.reset(seed=seed)[1]["task_id"] for seed in range(300)}
    assert "webshop/builtin-30/human/0" not in seen
    assert len(seen) == 29


def test_splits_are_the_official_ranges_and_never_overlap() -> None:
    assert split_range("test", 12_087) == range(500)
    assert split_range("eval", 12_087) == range(500, 1500)
    assert split_range("train", 12_087) == range(1500, 12_087)
    assert split_range("fork_train", 12_087) == range(4096)
    assert split_range("fork_test", 12_087) == range(4096, 4196)
    parts = [split_range(split, 600) for split in ("test", "eval", "train")]
    assert [index for part in parts for index in part] == list(range(600))
    with pytest.raises(ConfigError, match="600 goals"):
        split_range("fork_test", 600)
    tasks = {
        split: {WebShopEnv(split=split).reset(seed=seed)[1]["task_id"] for seed in range(80)}
        for split in ("train", "eval", "test")
    }
    assert not tasks["train"] & tasks["eval"]
    assert not (tasks["train"] | tasks["eval"]) & tasks["test"]


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"split": "tests"}, "Did you mean `test`"),
        ({"observation_mode": "html"}, "text_rich"),
        ({"draw": "weighted"}, "faithful"),
        ({"goals": "robots"}, "synthetic"),
        ({"num_products": 0}, "at least 1"),
        ({"num_prev_obs": -1}, "0 to 100"),
    ],
)
def test_a_wrong_argument_is_named(kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        WebShopEnv(**kwargs)


def test_a_wrong_index_is_named() -> None:
    for index in (-1, 10_000, "3"):
        with pytest.raises(ConfigError, match="0 to 9999"):
            WebShopEnv().reset(options={"index": index})


def test_broken_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PZ_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"No WebShop data.*'builtin'"):
        WebShopEnv(source=str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="items_shuffle"):
        WebShopEnv(source=str(tmp_path))
    _folder(tmp_path, [_record("a"), {"asin": "b"}], {})
    with pytest.raises(DataError, match=r"record 1 \(asin 'b'\)"):
        WebShopEnv(source=str(tmp_path))
    _folder(tmp_path, [], {})
    with pytest.raises(DataError, match="no products"):
        WebShopEnv(source=str(tmp_path))
    _folder(tmp_path, [_record("a")], {})
    with pytest.raises(ConfigError, match="has 0 goals"):
        WebShopEnv(source=str(tmp_path))
    (tmp_path / "items_shuffle.json").write_text('[{"asin": ')
    with pytest.raises(DataError, match=r"items_shuffle\.json is not JSON"):
        WebShopEnv(source=str(tmp_path))
    monkeypatch.setenv("PZ_DATA", str(tmp_path))
    with pytest.raises(DataError, match="PZ_DATA"):
        WebShopEnv(source="products_1000")
