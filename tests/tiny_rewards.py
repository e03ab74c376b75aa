"""Tiny random reward checkpoints in the published layouts, and what PyTorch says of them.

The oracles are transformers' own CLIP and BLIP; their tensors are written under the names, in the shapes and
in the containers of the published files. Images go through Pillow.
"""

import copy
import itertools
import json
import types

import numpy as np
from PIL import Image

from smart_grpo_jax.worlds.shapes import vocabulary

WORDS = "a photo of red green blue dog cat two three left right the and on café house bridge".split()
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz0123456789.,!?'-"]
VOCAB = [
    *PIECES,
    *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"),
    *(w for w in WORDS if len(w) > 1 and w.isascii()),
]
VOCAB += ["cafe"]

PROMPTS = [
    "a photo of a red dog",
    "two cats on the left of a blue house",
    "Café, bridge & the GREEN cat!",
    "",
    "red " * 90,
    "naïve façade 北京",
]

CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


SIZES = ((64, 64), (64, 71), (640, 480), (97, 224), (24, 24))
"""Square; one where the crop rules differ (3 mod 4 pixels to spare); the largest; wide; one that grows."""


def pictures(height, width, count=4, seed=0):
    """Noise, hard edges, a smooth ramp, and values out of range, [count,h,w,3]."""
    rng = np.random.default_rng([seed, height, width])
    y, x = np.mgrid[:height, :width] / max(height, width)
    noise = rng.uniform(0, 1, (height, width, 3))
    edges = np.stack([(np.sin((11 + seed) * x + k) * np.cos(7 * y) > 0) for k in range(3)], -1).astype(float)
    smooth = np.stack([x, y ** (1 + seed / 4), 1 - x * y], -1)
    wild = noise * 1.6 - 0.3
    return np.stack([noise, edges, smooth, wild][:count]).astype(np.float32)


def batch(height, width):
    """One image per prompt of PROMPTS."""
    images = pictures(height, width)
    return np.concatenate([images, images])[: len(PROMPTS)]


def eight_bit(images):
    """round(255 x), half to even, clamped."""
    return np.clip(np.round(images * 255), 0, 255).astype(np.uint8)


def in_floats(images, size, double=False):
    """What HPSv2 sees: 8-bit images resized in floats by torch, the overshoot kept, [b,3,size,size]."""
    import torch

    kind = torch.float64 if double else torch.float32
    pixels = torch.from_numpy(eight_bit(images)).permute(0, 3, 1, 2).to(kind) / 255
    height, width = pixels.shape[2:]
    short = min(height, width)
    new = (size * height // short, size * width // short)
    if new != (height, width):
        pixels = torch.nn.functional.interpolate(pixels, new, mode="bicubic", antialias=True)
    top, left = (round((n - size) / 2) for n in new)
    pixels = pixels[:, :, top : top + size, left : left + size].numpy()
    return (pixels - CLIP_MEAN[:, None, None]) / CLIP_STD[:, None, None]


def pillow(images, size, rule):
    """8-bit, shorter side to `size` by Pillow's bicubic, centre crop, normalised, [b,3,size,size]."""
    out = []
    for image in eight_bit(images):
        picture = Image.fromarray(image)
        w, h = picture.size
        short = min(w, h)
        new = (size * w // short, size * h // short)
        for step in ((new[0], h), new):  # width first: Pillow 13 alone turns that round for tall images
            picture = picture.resize(step, Image.Resampling.BICUBIC) if step != picture.size else picture
        spare = [n - size for n in picture.size]
        left, top = (round(s / 2) if rule == "tv" else s // 2 for s in spare)
        picture = picture.crop((left, top, left + size, top + size))
        out.append(((np.asarray(picture) / 255.0) - CLIP_MEAN) / CLIP_STD)
    return np.stack(out).transpose(0, 3, 1, 2)


def randomised(module, torch, seed):
    """Every parameter random, of unit gain, so that nothing hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim > 1:
                value.copy_(1.2 * noise / value[0].numel() ** 0.5)
            elif value.ndim == 1:
                value.copy_(0.2 * noise + float(name.endswith("weight")))
    return module.eval()


def write_bert_vocabulary(folder):
    """vocab.txt with the special tokens where a WordPiece tokenizer looks for them."""
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")


def mlp(torch, width, seed, inner=(1024, 128, 64, 16)):
    """The published head: five linear layers, the dropouts between them."""
    sizes = [width, *inner, 1]
    layers = []
    for index, (before, after) in enumerate(itertools.pairwise(sizes)):
        layers.append(torch.nn.Linear(before, after))
        if index < 3:
            layers.append(torch.nn.Dropout(0.1))
    head = torch.nn.Module()
    head.layers = torch.nn.Sequential(*layers)
    return randomised(head, torch, seed)


BLIP_RENAMES = (
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("encoder.layers", "blocks"),
    ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"),
    ("layer_norm", "norm"),
    ("post_norm", "norm"),
    ("post_layernorm", "norm"),
)


class ImageRewardOracle:
    """transformers' BLIP towers and the head; `score` as upstream's code does it, one image, one prompt."""

    def __init__(self, seed=0, image_size=32, patch=8, vision=(24, 3, 2), text=(32, 4, 2), **head):
        import torch
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.torch, self.size = torch, image_size
        width, self.vision_heads, depth = vision[0], vision[1], vision[2]
        hidden, self.text_heads, layers = text
        self.vision = randomised(
            BlipVisionModel(
                BlipVisionConfig(
                    hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth,
                    num_attention_heads=self.vision_heads, image_size=image_size, patch_size=patch,
                    layer_norm_eps=1e-6, hidden_act="gelu",
                )
            ), torch, seed,
        )  # fmt: skip
        self.text = randomised(
            BlipTextModel(
                BlipTextConfig(
                    vocab_size=len(VOCAB) + 2, hidden_size=hidden, encoder_hidden_size=width,
                    intermediate_size=4 * hidden, num_hidden_layers=layers,
                    is_decoder=True,  # which gives it cross-attention
                    num_attention_heads=self.text_heads, max_position_embeddings=64, layer_norm_eps=1e-12,
                    hidden_act="gelu",
                ), add_pooling_layer=False,
            ), torch, seed + 1,
        )  # fmt: skip
        self.head = mlp(torch, hidden, seed + 2, **head)

    def state(self):
        """The tensors of ImageReward.pt, with the unused ones that the published file holds."""
        out = {}
        for key, value in self.vision.state_dict().items():
            for old, new in BLIP_RENAMES:
                key = key.replace(old, new)
            out[f"blip.visual_encoder.{key}"] = value
        for key, value in self.text.state_dict().items():
            out[f"blip.text_encoder.{key}"] = value
        positions = self.torch.arange(64)[None]
        out["blip.text_encoder.embeddings.position_ids"] = positions
        out["blip.vision_proj.weight"] = self.torch.zeros(8, self.vision.config.hidden_size)
        out["blip.text_proj.bias"] = self.torch.zeros(8)
        for key, value in self.head.state_dict().items():
            out[f"mlp.{key}"] = value
        return {key: value.clone() for key, value in out.items()}

    def write(self, folder):
        """ImageReward.pt, med_config.json, vocab.txt."""
        folder.mkdir(parents=True, exist_ok=True)
        self.torch.save(self.state(), folder / "ImageReward.pt")
        med = {
            "architectures": ["BertModel"], "hidden_act": "gelu", "type_vocab_size": 2, "vocab_size": 30524,
            "hidden_size": self.text.config.hidden_size, "layer_norm_eps": 1e-12,
            "num_attention_heads": self.text_heads, "encoder_width": 768, "add_cross_attention": True,
        }  # fmt: skip
        (folder / "med_config.json").write_text(json.dumps(med))
        write_bert_vocabulary(folder)
        return folder

    def tokens(self, prompt):
        """35 ids and their mask, by transformers' own tokenizer."""
        from transformers import BertTokenizer

        tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(VOCAB)}, do_lower_case=True)
        out = tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
        return out.input_ids, out.attention_mask

    def parts(self, images, prompts, double=False):
        """Image tokens, text states and scores; in float64 on request."""
        torch = self.torch
        kind = torch.float64 if double else torch.float32
        vision, text, head = (copy.deepcopy(m).to(kind) for m in (self.vision, self.text, self.head))
        pixels = torch.from_numpy(pillow(images, self.size, "tv")).to(kind)
        with torch.no_grad():
            seen = vision(pixels).last_hidden_state
            ids, mask = (torch.cat(t) for t in zip(*map(self.tokens, prompts), strict=True))
            states = text(
                input_ids=ids,
                attention_mask=mask,
                encoder_hidden_states=seen,
                encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
                is_decoder=False,  # every token sees every other
            ).last_hidden_state
            value = head.layers(states[:, 0])[:, 0]
        score = (value - 0.16717362830052426) / 1.0333394966054072
        return seen.numpy(), states.numpy(), score.numpy()


def write_clip_vocabulary(folder):
    """A byte-level BPE of CLIP's kind, whose end token is the largest id; the number of its tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in vocabulary.files([w for w in WORDS if len(w) > 1], "<|endoftext|>").items():
        (folder / name).write_text(text, encoding="utf-8")
    return len(json.loads((folder / "vocab.json").read_text()))


def clip_ids(folder, prompts):
    """77 ids per prompt, by transformers' own tokenizer."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return np.array(tokenizer(list(prompts), padding="max_length", truncation=True, max_length=77).input_ids)


PARTS = ("text", "vision")


def differences(config):
    """What a config file says that leaves every default out."""
    defaults = type(config)().to_dict()
    return {key: value for key, value in config.to_dict().items() if value != defaults.get(key)}


class ClipOracle:
    """transformers' CLIPModel, tiny and random."""

    def __init__(
        self,
        seed=0,
        act="quick_gelu",
        image_size=28,
        patch=7,
        vision=(40, 5, 3),
        text=(24, 3, 2),
        width=20,
        vocab=600,
    ):
        import torch
        from transformers import CLIPConfig, CLIPModel

        self.torch, self.size = torch, image_size
        shared = {"hidden_act": act} if act != "quick_gelu" else {}
        self.config = CLIPConfig(
            text_config=dict(
                vocab_size=vocab, hidden_size=text[0], num_attention_heads=text[1], num_hidden_layers=text[2],
                intermediate_size=4 * text[0], max_position_embeddings=77, projection_dim=width,
                bos_token_id=vocab - 2, eos_token_id=2, pad_token_id=1, **shared,
            ),
            vision_config=dict(
                hidden_size=vision[0], num_attention_heads=vision[1], num_hidden_layers=vision[2],
                intermediate_size=4 * vision[0], image_size=image_size, patch_size=patch,
                projection_dim=width, **shared,
            ),
            projection_dim=width,
        )  # fmt: skip
        self.net = randomised(CLIPModel(self.config), torch, seed)
        with torch.no_grad():
            self.net.logit_scale.fill_(np.log(100.0))

    def write(self, folder, slim=True):
        """A CLIPModel folder whose config leaves the defaults out, as transformers writes it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.net.save_pretrained(folder)
        if slim:
            parts = {f"{name}_config": differences(getattr(self.config, f"{name}_config")) for name in PARTS}
            width = {"projection_dim": self.config.projection_dim}
            data = {"model_type": "clip", "architectures": ["CLIPModel"], **parts, **width}
            (folder / "config.json").write_text(json.dumps(data))
        return folder

    def parts(self, images, ids, rule="hf", double=False, pixels=None):
        """Image and text vectors (not normalised), and their cosine."""
        torch = self.torch
        kind = torch.float64 if double else torch.float32
        net = copy.deepcopy(self.net).to(kind)
        seen = pillow(images, self.size, rule) if pixels is None else pixels
        with torch.no_grad():
            image = net.visual_projection(net.vision_model(torch.from_numpy(seen).to(kind)).pooler_output)
            out = net.text_model(input_ids=torch.from_numpy(np.asarray(ids)).long())
            text = net.text_projection(out.pooler_output)
        cosine = (image / image.norm(dim=-1, keepdim=True) * text / text.norm(dim=-1, keepdim=True)).sum(-1)
        return image.numpy(), text.numpy(), cosine.numpy()

    def aesthetic(self, head, images, double=False):
        """The head's score of the unit image vectors."""
        torch = self.torch
        kind = torch.float64 if double else torch.float32
        vector = torch.from_numpy(self.parts(images, np.zeros((1, 4), int), double=double)[0]).to(kind)
        with torch.no_grad():
            unit = vector / vector.norm(dim=-1, keepdim=True)
            return copy.deepcopy(head).to(kind).layers(unit)[:, 0].numpy()

    def open_state(self):
        """The same network under open_clip's names: fused projections, transposed heads."""
        torch, theirs = self.torch, self.net.state_dict()
        out = {
            "visual.class_embedding": theirs["vision_model.embeddings.class_embedding"],
            "visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"],
            "visual.conv1.weight": theirs["vision_model.embeddings.patch_embedding.weight"],
            "visual.proj": theirs["visual_projection.weight"].T,
            "text_projection": theirs["text_projection.weight"].T,
            "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
            "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
            "logit_scale": theirs["logit_scale"],
        }
        norms = {
            "visual.ln_pre": "vision_model.pre_layrnorm",
            "visual.ln_post": "vision_model.post_layernorm",
            "ln_final": "text_model.final_layer_norm",
        }
        layers = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
                  "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip
        for leaf in ("weight", "bias"):
            for new, old in norms.items():
                out[f"{new}.{leaf}"] = theirs[f"{old}.{leaf}"]
            for new, old in (("visual.", "vision_model"), ("", "text_model")):
                stack = getattr(self.net, old).encoder.layers
                for i in range(len(stack)):
                    place, target = f"{old}.encoder.layers.{i}", f"{new}transformer.resblocks.{i}"
                    for theirs_name, name in layers.items():
                        out[f"{target}.{name}.{leaf}"] = theirs[f"{place}.{theirs_name}.{leaf}"]
                    qkv = [theirs[f"{place}.self_attn.{n}_proj.{leaf}"] for n in "qkv"]
                    out[f"{target}.attn.in_proj_{leaf}"] = torch.cat(qkv)
        return {key: value.clone() for key, value in out.items()}


def clips(root, torch, inner=(1024, 128, 64, 16), **sizes):
    """Two oracles with their files below `root`, and a head: `quick` is like OpenAI's CLIP and has the
    aesthetic head beside it, `exact` is like CLIP-H, `hps` the same in open_clip's layout.

    Heads are 8 numbers wide, no published width.
    """
    words = write_clip_vocabulary(root / "quick")
    for name in ("exact", "hps"):
        write_clip_vocabulary(root / name)
    quick = ClipOracle(vocab=words, **sizes)
    exact = ClipOracle(seed=5, act="gelu", vocab=words, **sizes)
    ids = clip_ids(root / "quick", [HESSEL + prompt for prompt in PROMPTS])
    with torch.no_grad():  # towards the prompts: below zero, Hessel's variant sees nothing
        quick.net.visual_projection.weight *= np.sign(quick.parts(batch(64, 64), ids)[2].sum())
    quick.write(root / "quick")
    exact.write(root / "exact")
    head = mlp(torch, quick.config.projection_dim, 7, inner)
    torch.save(head.state_dict(), root / "quick" / "sac+logos+ava1-l14-linearMSE.pth")
    torch.save({"state_dict": exact.open_state(), "epoch": 9}, root / "hps" / "HPS_v2.1_compressed.pt")
    torch.save({"state_dict": exact.open_state()}, root / "hps" / "HPS_v2_compressed.pt")
    return types.SimpleNamespace(root=root, quick=quick, exact=exact, head=head, torch=torch)


HESSEL = "A photo depicts "


def cosines(made, oracle, images, prompts, rule="hf", pixels=(None, None)):
    """PyTorch's cosines in float32 and float64."""
    ids = clip_ids(made.root / "quick", prompts)
    return [
        oracle.parts(images, ids, rule, double, pixels=given)[2]
        for double, given in zip((False, True), pixels, strict=True)
    ]


def hessel(made, images, prompts):
    """Hessel's code runs OpenAI's own preprocessing, which crops as torchvision does."""
    values = cosines(made, made.quick, images, [HESSEL + p for p in prompts], "tv")
    return [2.5 * np.maximum(value, 0) for value in values]


def hps(made, images, prompts):
    """On images that were resized in floats."""
    pixels = [in_floats(images, made.exact.size, double) for double in (False, True)]
    return cosines(made, made.exact, images, prompts, pixels=pixels)


def aesthetic(made, images, prompts):
    """The head on the image vectors, whatever the prompts are."""
    return [made.quick.aesthetic(made.head, images, double) for double in (False, True)]


ORIGINALS = {
    "clip_score": ("clip_score", "quick", {}, lambda m, x, p: cosines(m, m.quick, x, p)),
    "clip_score as Hessel": ("clip_score", "quick", {"variant": "hessel"}, hessel),
    "pick_score": ("pick_score", "exact", {}, lambda m, x, p: [100 * v for v in cosines(m, m.exact, x, p)]),
    "hps": ("hps", "hps", {"vision_heads": 5, "text_heads": 3}, hps),
    "aesthetic": ("aesthetic", "quick", {}, aesthetic),
}  # fmt: skip
"""Reward, folder below the root, options, and PyTorch's scores in float32 and float64."""


def gap(single, double):
    """What float32 alone costs PyTorch, as the largest difference."""
    return float(np.abs(np.asarray(single, np.float64) - np.asarray(double, np.float64)).max())


def tolerance(single, double):
    """Ten times that gap, but no less than the spacing of float32 at the largest value: where PyTorch
    happens to hit it, nobody can do better."""
    return max(10 * gap(single, double), float(np.spacing(np.float32(np.abs(double).max()))))


def assert_parity(ours, single, double):
    """Ours is as near to PyTorch's float64 as PyTorch's own float32, within a factor of ten."""
    assert np.shape(ours) == np.shape(double)
    assert np.isfinite(ours).all() and np.std(double) > 0
    assert gap(ours, double) <= tolerance(single, double)
