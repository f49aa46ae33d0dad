import pytest

from pz_bench import matrix
from pz_bench.matrix import Matrix, apply_override, expand, load_matrix
from pz_envs import catalog
from pz_envs.errors import ConfigError

SMALL = """
name: small
seeds: [0, 1]
defaults: {episodes: 4, env_kwargs: {tries: 2}}
rows:
  - algorithms: [random, expert]
    environments: [pz/Countdown-v0]
    env_kwargs: {numbers: [3]}
"""


def write(tmp_path, text, name="small.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def cells(tmp_path, text, *overrides):
    return expand(load_matrix(write(tmp_path, text), overrides))


def test_rows_multiply_their_lists_in_reading_order(tmp_path):
    found = cells(tmp_path, SMALL)
    assert [(cell.algorithm, cell.seed) for cell in found] == [
        ("random", 0),
        ("random", 1),
        ("expert", 0),
        ("expert", 1),
    ]
    assert {cell.episodes for cell in found} == {4}
    assert found[0].env_kwargs == {"tries": 2, "numbers": [3]}


def test_turns_left_out_are_the_environments_own(tmp_path):
    own = catalog.find("pz/Countdown-v0").max_turns
    assert {cell.max_turns for cell in cells(tmp_path, SMALL)} == {own}
    assert {cell.max_turns for cell in cells(tmp_path, SMALL, "max_turns=3")} == {3}


def test_a_family_stands_for_all_its_environments(tmp_path):
    text = SMALL.replace("[pz/Countdown-v0]", '["family:gymcards"]').replace("numbers: [3]", "")
    found = {cell.env for cell in cells(tmp_path, text)}
    assert found == {row.id for row in catalog.rows() if row.family == "gymcards"}
    with pytest.raises(ConfigError, match="Did you mean `gymcards`"):
        cells(tmp_path, text.replace("gymcards", "gymcard"))


def test_toml_says_the_same_as_yaml(tmp_path):
    toml = """
name = "small"
seeds = [0, 1]
defaults = { episodes = 4, env_kwargs = { tries = 2 } }
[[rows]]
algorithms = ["random", "expert"]
environments = ["pz/Countdown-v0"]
env_kwargs = { numbers = [3] }
"""
    other = expand(load_matrix(write(tmp_path, toml, "small.toml")))
    assert other == cells(tmp_path, SMALL)


def test_globs_name_every_environment_they_match_once(tmp_path):
    text = "rows: [{algorithms: [random], environments: ['pz/*', pz/Countdown-v0]}]"
    assert [cell.env for cell in cells(tmp_path, text)] == [row.id for row in catalog.rows()]


def test_a_glob_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no environment matches `qq/"):
        cells(tmp_path, "rows: [{algorithms: [random], environments: ['qq/*']}]")


def test_excluded_cells_are_left_out(tmp_path):
    text = SMALL + "exclude: [{algorithm: exp*, env: 'pz/Count*'}]\n"
    assert {cell.algorithm for cell in cells(tmp_path, text)} == {"random"}
    with pytest.raises(ConfigError, match="every cell is excluded"):
        cells(tmp_path, SMALL + "exclude: [{env: '*'}]\n")


def test_models_and_training_reach_only_the_algorithms_that_take_them(tmp_path):
    text = """
seeds: [0]
rows:
  - algorithms: [random, zeroshot, grpo]
    environments: [pz/Countdown-v0]
    models: [tiny]
    train: {steps: 2}
"""
    found = {cell.algorithm: cell for cell in cells(tmp_path, text)}
    assert found["random"].model is None
    assert found["zeroshot"].model == "tiny"
    assert [name for name, cell in found.items() if cell.train] == ["grpo"]


def test_an_algorithm_that_needs_a_model_says_so(tmp_path):
    with pytest.raises(ConfigError, match="`zeroshot` needs a model"):
        cells(tmp_path, "rows: [{algorithms: [zeroshot], environments: [pz/Countdown-v0]}]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL + "sedes: [1]\n", "unknown key `sedes`. Did you mean `seeds`"),
        (SMALL.replace("algorithms", "algoritms"), "Did you mean `algorithms`"),
        (SMALL.replace("episodes: 4", "episode: 4"), "Did you mean `episodes`"),
        (SMALL.replace("expert", "expart"), "Did you mean `expert`"),
        (SMALL.replace("Countdown-v0", "Countdwn-v0"), "Did you mean `pz/Countdown-v0`"),
        (SMALL.replace("episodes: 4", "episodes: 0"), "defaults.episodes"),
        ("rows: []", "rows"),
        ("- 1", "a matrix is a mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, text, message):
    with pytest.raises(ConfigError) as caught:
        cells(tmp_path, text)
    assert message in str(caught.value)


def test_wrong_training_settings_are_found_before_anything_runs(tmp_path):
    text = """
rows:
  - {algorithms: [grpo], environments: [pz/Countdown-v0], models: [tiny], train: {stepz: 2}}
"""
    with pytest.raises(ConfigError, match="Did you mean `steps`"):
        cells(tmp_path, text)


def test_set_reaches_the_matrix_a_row_or_every_row(tmp_path):
    assert {cell.episodes for cell in cells(tmp_path, SMALL, "episodes=9")} == {9}
    assert {cell.episodes for cell in cells(tmp_path, SMALL, "defaults.episodes=9")} == {9}
    assert {cell.episodes for cell in cells(tmp_path, SMALL, "rows.0.episodes=9")} == {9}
    assert {cell.seed for cell in cells(tmp_path, SMALL, "seeds=[5]")} == {5}
    changed = cells(tmp_path, SMALL, "env_kwargs.tries=7")
    assert changed[0].env_kwargs == {"tries": 7, "numbers": [3]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("episodes", "path=value"),
        ("episods=3", "Did you mean `episodes`"),
        ("rows.7.episodes=3", "no index below 1"),
        ("episodes=[", "not YAML"),
        ("name.a=3", "holds no keys"),
    ],
)
def test_a_wrong_set_is_explained(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_override({"name": "x", "rows": [{}]}, override)


def test_set_leaves_what_it_was_given_alone():
    values = {"rows": [{"episodes": 1}]}
    assert apply_override(values, "episodes=2") == {"rows": [{"episodes": 2}]}
    assert values == {"rows": [{"episodes": 1}]}


def test_a_matrix_that_is_not_there_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean `starter`"):
        load_matrix("startr")
    with pytest.raises(ConfigError, match="No matrix file"):
        load_matrix("nowhere.yaml")


@pytest.mark.parametrize("name", matrix.matrix_names())
def test_every_built_in_matrix_is_named_like_its_file_and_expands(name):
    loaded = load_matrix(name)
    assert isinstance(loaded, Matrix)
    assert loaded.name == name
    assert expand(loaded)


def test_the_starter_is_the_whole_path_on_three_seeds():
    found = expand(load_matrix("starter"))
    games = {"pz/Zork1-v0", "pz/Detective-v0", "pz/Pentari-v0"}
    everywhere = {(agent, env) for agent in ("random", "expert", "zeroshot") for env in games}
    everywhere |= {(a, "pz/Countdown-v0") for a in ("random", "expert", "zeroshot", "grpo")}
    assert {(cell.algorithm, cell.env) for cell in found} == everywhere
    assert {cell.seed for cell in found} == {0, 1, 2}
    assert len(found) == 39
