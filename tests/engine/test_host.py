"""A host that changed its words is refused at the patch; what the check cannot see is refused while running."""

import ast
import copy
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

import vtc
from vtc import errors
from vtc.adapter import adapter_for
from vtc.engine.host import cache as host
from vtc.engine.host import contract, names
from vtc.testing import families, relative_difference, tiny
from vtc.testing.tiny import PROMPTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_switch(monkeypatch):
    monkeypatch.delenv(contract.SWITCH, raising=False)


_STOCK = tiny("llava").model
WORD = names.cache_words(_STOCK)[0]  # of the installed host


class TestWordsStandOnce:
    """A rename is a line in `names`: no other file of the engine or of the adapters spells a word of the host."""

    WORDS = frozenset(value for name, value in vars(names).items() if name.isupper() and isinstance(value, str))

    @staticmethod
    def sources(*folders):
        for folder in folders:
            yield from (path for path in (ROOT / folder).rglob("*.py") if path.parent.name != "host")

    def test_in_the_engine_and_the_adapters(self):
        assert "attention_mask" in self.WORDS
        found = [
            f"{path.relative_to(ROOT)}:{node.lineno} {node.value!r}"
            for path in self.sources("vtc/engine", "adapters/src")
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in self.WORDS
        ]
        assert not found

    def test_the_cache_in_every_file(self):
        assert names.CACHE_WORDS == ("cache", "past_" + "key_values")
        old = names.CACHE_WORDS[1]
        everywhere = self.sources("vtc", "adapters/src", "kernels/src", "eval/src", "demos/src", "tests")
        found = [path.relative_to(ROOT) for path in everywhere if old in path.read_text()]
        assert not found


class TestVersion:
    @pytest.mark.parametrize("version", ["4.57.6", "5.17.0", "5.18.0", "5.25.0", "5.25.0.dev0", "6.0.0"])
    def test_outside_the_range(self, sdpa_llava, monkeypatch, version):
        monkeypatch.setattr(contract, "installed", lambda: version)
        before = dict(vars(sdpa_llava.model.model))
        refused = pytest.raises(
            errors.UnsupportedModelError, match=rf"transformers {version} is outside.*>=5\.19,<5\.25"
        )
        with refused:
            vtc.patch(sdpa_llava.model, "random:5")
        with refused, vtc.compress(sdpa_llava.model, "random:5"):
            pass
        assert vars(sdpa_llava.model.model) == before
        monkeypatch.setenv(contract.SWITCH, "0")
        with refused:
            vtc.patch(sdpa_llava.model, "random:5")
        monkeypatch.setenv(contract.SWITCH, "1")
        vtc.patch(sdpa_llava.model, "random:5").remove()
        with pytest.raises(errors.UnsupportedModelError, match="'kv_store'"):  # words are checked on every version
            vtc.patch(renamed("layer").model, "random:5")

    def test_an_encoder_by_itself(self, sdpa_llava, monkeypatch):
        monkeypatch.setattr(contract, "installed", lambda: "5.25.0")
        with pytest.raises(errors.UnsupportedModelError, match="outside the tested range"):
            vtc.patch_encoder(sdpa_llava.model.model.vision_tower, "tome", 0.5)

    def test_the_range_is_that_of_the_package(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert f"transformers{contract.tested_range()}" in project["dependencies"]
        assert contract.TESTED == ("5.19", "5.25")

    @pytest.mark.parametrize("version", ["5.19.0", "5.20.2", "5.24.0", "5.24.7"])
    def test_inside_the_range(self, version):
        assert contract.is_tested(version)


class RenamedLayer(LlamaDecoderLayer):
    """A decoder layer of a host that calls the KV cache by a word of its own."""

    def forward(
        self, hidden_states, attention_mask=None, position_ids=None, kv_store=None, position_embeddings=None, **kwargs
    ):
        return super().forward(
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            position_embeddings=position_embeddings,
            **names.cache_argument(_STOCK, kv_store),
            **kwargs,
        )

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, kv_store=kwargs.pop(WORD), **kwargs)


class RenamedModel(LlamaModel):
    """The same for the language model; what it returns has another word, too."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, kv_store=None, inputs_embeds=None, **rest
    ):
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **names.cache_argument(_STOCK, kv_store),
            **rest,
        )

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, kv_store=kwargs.pop(WORD), **kwargs)


def renamed(part):
    one = tiny("llava")
    lm = one.model.model.language_model
    if part == "layer":
        for layer in lm.layers:
            layer.__class__ = RenamedLayer
    else:
        lm.__class__ = RenamedModel
    return one


def hand_on(stock):
    def forward(self, *args, **kwargs):
        return stock.forward(self, *args, **kwargs)

    return forward


def hand_on_to(original):
    def forward(self, *args, **kwargs):
        return original(self, *args, **kwargs)

    return forward


class TestAHostWithAnotherWord:
    @pytest.mark.parametrize(("part", "what"), [("layer", "decoder layer"), ("model", "language model")])
    def test_the_patch_is_refused(self, part, what):
        one = renamed(part)
        inputs = one.inputs()
        expected = one.model(**inputs).logits  # the host itself works
        before = dict(vars(one.model.model))
        with pytest.raises(errors.UnsupportedModelError, match=rf"Renamed\w+\.forward \({what}\).*'kv_store'"):
            vtc.patch(one.model, "random:5")
        assert vars(one.model.model) == before
        assert torch.equal(one.model(**inputs).logits, expected)

    @pytest.mark.parametrize(
        "spec", ["random:5", "fastervlm:5", "fastv@2:5", "shortv(layers=1|2)", "random:5 + dart@2:3"]
    )
    @pytest.mark.parametrize("part", ["layer", "model"])
    def test_no_result_without_the_check(self, part, spec, monkeypatch):
        monkeypatch.setattr(contract, "check", lambda adapter: None)
        one = renamed(part)
        inputs = one.inputs()
        expected = one.model(**inputs).logits
        with vtc.compress(one.model, spec), pytest.raises(errors.StateError, match="by a word that vtc knows"):
            one.model.generate(**inputs, max_new_tokens=3)
        assert torch.equal(one.model(**inputs).logits, expected)

    def test_a_second_turn_without_pixels(self, monkeypatch):
        monkeypatch.setattr(contract, "check", lambda adapter: None)
        one = renamed("model")
        with vtc.compress(one.model, "random:5"), pytest.raises(errors.StateError, match="by a word that vtc knows"):
            one.model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=True)

    def test_another_word_for_the_embeddings(self, sdpa_llava, monkeypatch):
        lm = sdpa_llava.model.model.language_model
        hook = lm.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {"embeds": kwargs.pop("inputs_embeds"), **kwargs}), with_kwargs=True
        )
        with (
            vtc.compress(sdpa_llava.model, "random:5"),
            pytest.raises(errors.StateError, match="without 'inputs_embeds'"),
        ):
            sdpa_llava.model(**sdpa_llava.inputs())
        hook.remove()

    @pytest.mark.parametrize(("role", "words"), contract.WORDS.items())
    def test_every_word_of_every_part(self, sdpa_llava, monkeypatch, role, words):
        for word in words:
            monkeypatch.setitem(contract.WORDS, role, tuple("renamed" if word == one else one for one in words))
            with pytest.raises(errors.UnsupportedModelError, match=rf"\({role}\) takes no 'renamed'.*'{word}'"):
                vtc.patch(sdpa_llava.model, "random:5")

    def test_words_of_one_family(self, monkeypatch):
        one = tiny("qwen3_vl")
        assert adapter_for(one.model).words == {"language model": ("visual_pos_masks", "deepstack_visual_embeds")}
        monkeypatch.setattr(type(adapter_for(one.model)), "words", {"language model": ("deepstack",)})
        with pytest.raises(errors.UnsupportedModelError, match="takes no 'deepstack'"):
            vtc.patch(one.model, "random:5")

    def test_a_cache_that_is_asked_otherwise(self, sdpa_llava, monkeypatch):
        contract._check_cache.cache_clear()
        monkeypatch.setitem(host.ASKED, "get_mask_sizes", ("query_length", "cache_position"))
        with pytest.raises(errors.UnsupportedModelError, match=r"get_mask_sizes takes \(query_length, layer_idx\)"):
            vtc.patch(sdpa_llava.model, "random:5")
        contract._check_cache.cache_clear()

    @pytest.mark.parametrize("missing", ["get_query_offset", "heads_of"])
    def test_a_cache_without_a_member(self, sdpa_llava, monkeypatch, missing):
        contract._check_cache.cache_clear()
        monkeypatch.setattr(host, "MEMBERS", (*host.MEMBERS, "heads_of"))
        if missing in host.MEMBERS[:-1]:
            monkeypatch.setattr(host, "MEMBERS", host.MEMBERS[:-1])
            monkeypatch.delattr(DynamicCache.__mro__[1], missing)
        with pytest.raises(errors.UnsupportedModelError, match=rf"DynamicCache has no '{missing}'"):
            vtc.patch(sdpa_llava.model, "random:5")
        monkeypatch.undo()
        monkeypatch.setattr(host, "LAYER_MEMBERS", (*host.LAYER_MEMBERS, "heads_of"))
        with pytest.raises(errors.UnsupportedModelError, match="DynamicLayer has no 'heads_of'"):
            vtc.patch(sdpa_llava.model, "random:5")
        contract._check_cache.cache_clear()

    def test_an_encoder_method_of_another_name(self, sdpa_llava, monkeypatch):
        encoder = adapter_for(sdpa_llava.model).encoders[0]
        monkeypatch.setattr(encoder.__class__, "method", "see", raising=False)
        object.__setattr__(encoder, "method", "see")
        monkeypatch.setattr(type(adapter_for(sdpa_llava.model)), "encoders", (encoder,))
        with pytest.raises(errors.UnsupportedModelError, match="has no method 'see'"):
            vtc.patch(sdpa_llava.model, "random:5")

    @pytest.mark.parametrize("part", ["outer", "inner", "model", "layer"])
    def test_a_subclass_that_hands_everything_on(self, part):
        one = tiny("llava")
        inner = one.model.model
        parts = {"outer": one.model, "inner": inner, "model": inner.language_model}
        for module in inner.language_model.layers if part == "layer" else [parts[part]]:
            stock = type(module)
            module.__class__ = type(f"My{stock.__name__}", (stock,), {"forward": hand_on(stock)})
        inputs = one.inputs(PROMPTS)
        found = []
        for model in (one.model, _STOCK):
            with vtc.compress(model, "random:5 + fastv@2:3"), torch.no_grad():
                output = model(**inputs, use_cache=True)
                step = {"input_ids": torch.full((3, 1), 9), **names.cache_argument(model, names.cache_of(output))}
                found.append((output.logits, model(**step).logits))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])

    def test_a_subclass_with_parameters_of_its_parent(self, monkeypatch):
        one = tiny("llava")
        stock = type(one.model)

        class Mine(stock):
            def forward(self, input_ids=None, pixel_values=None, attention_mask=None, **rest):
                given = {"input_ids": input_ids, "pixel_values": pixel_values, "attention_mask": attention_mask}
                return super().forward(**given, **rest)

        one.model.__class__ = Mine
        inputs = one.inputs(PROMPTS)
        with vtc.compress(_STOCK, "random:5"), torch.no_grad():
            expected = _STOCK.generate(**inputs, max_new_tokens=3, do_sample=False)
        with vtc.compress(one.model, "random:5"), torch.no_grad():
            assert torch.equal(one.model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)

    def test_a_forward_that_takes_whatever_it_gets(self, monkeypatch):
        one = tiny("llava")
        inputs = one.inputs(PROMPTS)
        with vtc.compress(one.model, "shortv(layers=1|2)"), torch.no_grad():
            expected = one.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        for cls in (LlamaDecoderLayer, LlamaModel, type(one.model.model)):
            monkeypatch.setattr(cls, "forward", hand_on_to(cls.forward))
        with vtc.compress(one.model, "shortv(layers=1|2)"), torch.no_grad():
            assert torch.equal(one.model.generate(**inputs, max_new_tokens=3, do_sample=False), expected)

    def test_a_subclass_that_lost_a_word_is_told_so(self):
        one = tiny("llava")
        layer = one.model.model.language_model.layers[0]

        class Mine(type(layer)):
            def forward(self, hidden_states, attention_mask=None, angles=None, **rest):
                return super().forward(hidden_states, attention_mask, position_embeddings=angles, **rest)

        layer.__class__ = Mine
        what = r"Mine\.forward \(decoder layer\) takes no .*'angles'.*Mine is no class of transformers: let its forward"
        with pytest.raises(errors.UnsupportedModelError, match=what):
            vtc.patch(one.model, "random:5")

    @pytest.mark.parametrize("part", ["language_model", "layers"])
    def test_a_part_that_is_not_where_it_was(self, monkeypatch, part):
        one = tiny("llava")
        adapter = adapter_for(one.model)

        def moved(self):
            raise AttributeError(f"no attribute {part!r}")

        monkeypatch.setattr(type(adapter), part, property(moved))
        with pytest.raises(errors.UnsupportedModelError, match=rf"is not where it was: no attribute '{part}'"):
            contract.check(adapter)

    @pytest.mark.parametrize("family", families())
    def test_every_stock_family_passes(self, family):
        contract.check(adapter_for(tiny(family).model))


class TestGuards:
    """Run-time guards, on the stock host."""

    @pytest.mark.parametrize("with_pixels", [True, False])
    @pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
    def test_embeddings_instead_of_ids(self, family, with_pixels):
        one = tiny(family)
        inputs = one.inputs()
        embeds = one.model.get_input_embeddings()(inputs.pop("input_ids"))
        if not with_pixels:
            inputs = {"attention_mask": inputs["attention_mask"]}
        with vtc.compress(one.model, "random:5"):
            with pytest.raises(errors.InputError, match="Pass input_ids"):
                one.model(inputs_embeds=embeds, **inputs)
            if family == "gemma3":
                return  # whose stock generate takes no embeddings
            with pytest.raises(errors.InputError, match="Pass input_ids"):
                one.model.generate(inputs_embeds=embeds, **inputs, max_new_tokens=2)

    def test_one_embedding_on_a_cache(self, sdpa_llava):
        model, inputs = sdpa_llava.model, sdpa_llava.inputs()
        word = torch.tensor([[9]])
        with vtc.compress(model, "random:5"), torch.no_grad():
            cache = names.cache_of(model(**inputs, use_cache=True))
            twin = copy.deepcopy(cache)
            by_id = model(input_ids=word, **names.cache_argument(model, cache)).logits
            embeds = model.get_input_embeddings()(word)
            by_embedding = model(inputs_embeds=embeds, **names.cache_argument(model, twin)).logits
        assert torch.equal(by_id, by_embedding)

    @pytest.mark.parametrize(
        ("spec", "what"), [("random:5", "attention_mask covers"), ("fastv@2:5", "layers of this KV")]
    )
    def test_a_cache_that_lost_its_memory(self, sdpa_llava, spec, what):
        model, inputs = sdpa_llava.model, sdpa_llava.inputs()
        with vtc.compress(model, spec), torch.no_grad():
            cache = names.cache_of(model(**inputs, use_cache=True))
            copied = DynamicCache()
            for index, layer in enumerate(cache.layers):
                copied.update(layer.keys, layer.values, index)
            mask = torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
            given = names.cache_argument(model, copied)
            with pytest.raises(errors.StateError, match=what):
                model(input_ids=torch.tensor([[9]]), attention_mask=mask, **given)

    @pytest.mark.parametrize("spec", ["random:5", "fastv@2:5"])
    @pytest.mark.parametrize("family", ["llava", "gemma3", "qwen3_vl"])
    def test_a_compressed_cache_without_the_patch(self, family, spec):
        one = tiny(family)
        model, inputs = one.model, one.inputs(PROMPTS)
        if family == "qwen3_vl":
            spec = spec.replace("@2", "@3")  # behind its DeepStack layers
        with vtc.compress(model, spec), torch.no_grad():
            first = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True)
            whole = one.extend(inputs, first.sequences[:, inputs["input_ids"].shape[1] :])
        told = {name: value for name, value in whole.items() if value.shape == whole["input_ids"].shape}
        with pytest.raises(errors.StateError, match="is not the one whose patch made it"):
            model.generate(**told, **names.cache_argument(model, names.cache_of(first)), max_new_tokens=2)

    @pytest.mark.parametrize("more", [-3, 3])
    @pytest.mark.parametrize("family", ["llava", "gemma3"])
    def test_a_mask_that_fits_neither(self, family, more):
        one = tiny(family)
        model, inputs = one.model, one.inputs()
        with vtc.compress(model, "random:5"), torch.no_grad():
            cache = names.cache_of(model(**inputs, use_cache=True))
            mask = torch.ones(1, inputs["input_ids"].shape[1] + 1 + more, dtype=torch.long)
            given = names.cache_argument(model, cache)
            with pytest.raises(errors.StateError, match="attention_mask covers"):
                model(input_ids=torch.tensor([[9]]), attention_mask=mask, **given)

    def test_a_mask_of_four_dimensions(self, sdpa_llava):
        model, inputs = sdpa_llava.model, sdpa_llava.inputs()
        length = inputs["input_ids"].shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        with vtc.compress(model, "random:5", positions="original"), torch.no_grad():
            expected = model(**inputs).logits
            assert relative_difference(model(**{**inputs, "attention_mask": causal}).logits, expected) < 1e-5
            with pytest.raises(errors.StateError, match="attention mask has the shape"):
                model(**{**inputs, "attention_mask": causal[..., :-2]})

    def test_the_patched_model_beside_a_copy(self, sdpa_llava):
        """A patch somewhere does not make every reader of the cache a patched one."""
        twin, model, inputs = copy.deepcopy(sdpa_llava.model), sdpa_llava.model, sdpa_llava.inputs(PROMPTS)
        with vtc.compress(model, "random:5"), torch.no_grad():
            cache = names.cache_of(model(**inputs, use_cache=True))
            word = torch.full((3, 1), 9)
            with pytest.raises(errors.StateError, match="is not the one whose patch made it"):
                twin(input_ids=word, **names.cache_argument(twin, cache))
            lm = model.model.language_model
            with pytest.raises(errors.StateError, match="a language model called by itself"):
                lm(input_ids=word, **names.cache_argument(lm, cache))

    @pytest.mark.parametrize("inside", [True, False])
    @pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
    def test_an_emptied_cache_is_a_new_one(self, family, inside):
        one = tiny(family)
        model, text = one.model, one.inputs([(30,)])
        word = torch.tensor([[9]])
        with torch.no_grad():
            with vtc.compress(model, "random:5") as handle:
                cache = names.cache_of(model(**one.inputs(), use_cache=True))
                cache.reset()
                if not inside:
                    handle.remove()
                model(**text, **names.cache_argument(model, cache))
                assert cache.get_seq_length() == 30
                again = model(input_ids=word, **names.cache_argument(model, cache)).logits
            fresh = names.cache_of(model(**text, use_cache=True))
            expected = model(input_ids=word, **names.cache_argument(model, fresh)).logits
        assert relative_difference(again, expected) < 1e-6

    @pytest.mark.parametrize("positions", ["original", "compact", "renumber"])
    @pytest.mark.parametrize("spec", ["random:5", "fastv@2:4", "shortv(layers=1)", "pool:5"])
    def test_samples_in_another_order(self, sdpa_llava, spec, positions):
        model, inputs = sdpa_llava.model, sdpa_llava.inputs(PROMPTS)
        word, order = torch.tensor([[9], [10], [11]]), torch.tensor([1, 0, 2])
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
        size_bias = {"size_bias": True} if spec.startswith("pool") else {}
        with vtc.compress(model, spec, positions=positions, **size_bias), torch.no_grad():
            cache = names.cache_of(model(**inputs, use_cache=True))

            def decode(cache, rows):
                given = {"input_ids": word[rows], "attention_mask": mask[rows]}
                return model(**given, **names.cache_argument(model, cache)).logits

            reordered, chosen = copy.deepcopy(cache), copy.deepcopy(cache)
            expected = decode(cache, torch.arange(3))
            reordered.reorder_cache(order)
            torch.testing.assert_close(decode(reordered, order), expected[order])
            chosen.batch_select_indices(order[:2])
            torch.testing.assert_close(decode(chosen, order[:2]), expected[order[:2]])

    def test_hidden_states_by_keyword(self, sdpa_llava):
        model, inputs = sdpa_llava.model, sdpa_llava.inputs()
        with vtc.compress(model, "fastv@2:4"), torch.no_grad():
            expected = model(**inputs).logits
        hook = model.model.language_model.layers[2].register_forward_pre_hook(
            lambda module, args, kwargs: ((), {"hidden_states": args[0], **kwargs}), with_kwargs=True
        )
        with vtc.compress(model, "fastv@2:4"), torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)
        hook.remove()

    @pytest.mark.parametrize("wrong", ["cache", "rotations"])
    def test_a_first_layer_that_gets_something_else(self, sdpa_llava, wrong):
        model = sdpa_llava.model
        word = names.cache_words(model.model.language_model.layers[0])[0]

        def change(module, args, kwargs):
            if wrong == "cache":
                return args, {**kwargs, word: DynamicCache()}
            return args, {**kwargs, "position_embeddings": tuple(x[:, 1:] for x in kwargs["position_embeddings"])}

        hook = model.model.language_model.layers[0].register_forward_pre_hook(change, with_kwargs=True)
        what = "did not get the KV cache" if wrong == "cache" else "rotations for"
        with vtc.compress(model, "random:5"), pytest.raises(errors.StateError, match=what):
            model.generate(**sdpa_llava.inputs(), max_new_tokens=2)
        hook.remove()

    @pytest.mark.parametrize("spec", ["fastv@2:5", "shortv(layers=2)"])
    def test_a_mask_of_one_layer(self, spec):
        one = tiny("llava", "eager")
        layer = one.model.model.language_model.layers[2]
        hook = layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": kwargs["attention_mask"][..., 1:]}),
            with_kwargs=True,
        )
        with vtc.compress(one.model, spec), pytest.raises(errors.StateError, match="attention mask has the shape"):
            one.model(**one.inputs())
        hook.remove()

    @pytest.mark.parametrize("text_only", [False, True])
    def test_positions_of_another_width(self, sdpa_llava, text_only):
        model, inputs = sdpa_llava.model, sdpa_llava.inputs()
        if text_only:
            inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
        positions = torch.arange(inputs["input_ids"].shape[1] - 1)[None]
        with vtc.compress(model, "random:5"), pytest.raises(errors.StateError, match="got positions for"):
            model(**inputs, position_ids=positions)

    def test_images_that_never_reach_the_language_model(self, sdpa_llava, monkeypatch):
        inner, inputs = sdpa_llava.model.model, sdpa_llava.inputs()
        monkeypatch.setattr(
            inner, "forward", lambda pixel_values=None, **kwargs: inner.get_image_features(pixel_values)
        )
        with vtc.compress(sdpa_llava.model, "random:5"), pytest.raises(errors.StateError, match="was never called"):
            inner(**inputs)

    def test_rows_that_are_not_those_of_the_door(self, sdpa_llava):
        lm = sdpa_llava.model.model.language_model
        with vtc.compress(sdpa_llava.model, "random:5"):
            hook = lm.register_forward_pre_hook(
                lambda module, args, kwargs: (args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"][:, 1:]}),
                with_kwargs=True,
            )
            with pytest.raises(errors.StateError, match="went in at the door"):
                sdpa_llava.model(**sdpa_llava.inputs(), use_cache=False)
            hook.remove()

    @pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "paligemma"])
    def test_who_reads_pixels_of_a_later_turn_since_when(self, family, monkeypatch):
        since = adapter_for(tiny(family).model).later_pixels_since
        assert since == ("" if family in ("llava", "paligemma") else "5.23")
        older = {}
        for version in ("5.9.0", "5.22.2", "5.23.0", "5.100.0"):
            monkeypatch.setattr(contract, "installed", lambda version=version: version)
            older[version] = contract.is_older(since)
        refused = bool(since)
        assert older == {"5.9.0": refused, "5.22.2": refused, "5.23.0": False, "5.100.0": False}

    def test_pixels_of_a_later_turn_on_an_older_host(self, monkeypatch):
        one = tiny("gemma3")
        monkeypatch.setattr(contract, "installed", lambda: "5.22.2")
        inputs = one.inputs(PROMPTS[:1])
        with vtc.compress(one.model, "random:5"), torch.no_grad():
            cache = names.cache_of(one.model(**inputs, use_cache=True))
            again = {name: value for name, value in inputs.items() if name != "attention_mask"}
            with pytest.raises(errors.UnsupportedFeatureError, match=r"stock model reads pixels.*5\.23 or newer"):
                one.model(**again, **names.cache_argument(one.model, cache))
