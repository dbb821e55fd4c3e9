"""What a configuration says block by block, when only some blocks are left."""

from surgeon.models.depth import per_layer_changes, shorter_config

DESCRIBED = {
    **{"num_hidden_layers": 4, "max_window_layers": 2, "first_k_dense_replace": 1, "hidden_size": 32},
    **{"layer_types": ["a", "b", "a", "c"], "no_rope_layers": (1, 0, 1, 0), "mlp_only_layers": [0, 1, 2, 3]},
    **{"moe_layers": [1, 3], "eos_token_id": [5, 6, 7, 8], "architectures": ["X"], "rope": {"long": [1, 2, 3, 4]}},
}


def test_everything_by_block_changes_and_nothing_else() -> None:
    assert per_layer_changes(DESCRIBED, 4, [1, 3]) == {
        **{"num_hidden_layers": 2, "max_window_layers": 1, "first_k_dense_replace": 0},
        **{"layer_types": ["b", "c"], "no_rope_layers": [0, 0], "mlp_only_layers": [0, 1], "moe_layers": [0, 1]},
    }
    assert per_layer_changes(DESCRIBED, 4, [0, 2, 3])["moe_layers"] == [2]


def test_a_list_of_another_length_is_about_something_else() -> None:
    assert per_layer_changes({"num_hidden_layers": 4, "sizes": [1, 2, 3]}, 4, [0]) == {"num_hidden_layers": 1}
    assert per_layer_changes({"num_hidden_layers": 9, "n_layer": 4}, 4, [0, 2]) == {"n_layer": 2}


def test_what_the_file_leaves_to_defaults_is_written_out() -> None:
    shorter = shorter_config({"model_type": "x", "hidden_size": 32}, DESCRIBED, 4, [3])
    assert shorter["layer_types"] == ["c"]
    assert (shorter["model_type"], shorter["hidden_size"], shorter["num_hidden_layers"]) == ("x", 32, 1)
    assert "eos_token_id" not in shorter


def test_the_part_about_text_and_descriptions_of_compact_exports() -> None:
    config = {"text_config": {"hidden_size": 32, "num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}}
    shorter = shorter_config(config, DESCRIBED, 4, [0, 3])
    assert shorter["text_config"]["num_hidden_layers"] == 2
    assert shorter["vision_config"] == {"num_hidden_layers": 4}
    assert "num_hidden_layers" not in shorter
    described = {"pruned": {"format": 1, "layers": ["first", "second", "third", "fourth"]}}
    assert shorter_config(described, DESCRIBED, 4, [0, 3])["pruned"] == {"format": 1, "layers": ["first", "fourth"]}
    assert len(described["pruned"]["layers"]) == 4  # type: ignore[arg-type]
