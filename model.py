"""The policy: a vision-language model that acts, and that can say how likely its actions were.

A policy has two methods. `act` samples one turn for each trajectory; `logprobs` gives the
log-probabilities of all sampled tokens, with gradients. `Policy` does both with plain transformers:
padded batches, `model.generate`, one forward. It is what you read, and what `--slow` runs.
`engine/fast.py` wraps it and does the same several times faster; tests hold the two together.

Any Qwen2.5-VL or Qwen3-VL checkpoint is a policy. `tiny_policy` builds the same architecture with
0.8 M parameters, for laptops.

Shapes: B sequences, T tokens of the longest, A action tokens of all sequences, V vocabulary.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from data import Action
from engine.checkpoint import checkpoint_folder, load_parts
from engine.checkpoint import save_policy as save_policy  # also found here
from engine.prompt import encode
from engine.tiny import write_tiny_policy

CLOSING_TAGS = ("</code>", "</answer>")  # an action ends where one of these is complete
NEVER = -1e9  # added to the logits of tokens that must not be sampled


class Policy:
    """A vision-language model with its tokenizer and its image processor.

    ban: (V,), added to logits. It keeps the policy from sampling image and video placeholders,
    which would need pixels, and ids that the tokenizer does not know.
    """

    def __init__(self, model, tokenizer, image_processor, device=None):
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.device = device or model.device
        self.generator = torch.Generator(self.device)
        self.image_token = model.config.image_token_id
        to_ids = tokenizer.convert_tokens_to_ids
        self.end = to_ids("<|im_end|>")
        self.ends = {self.end, to_ids("<|endoftext|>")}
        # Only a token with a ">" in it can complete a closing tag.
        vocabulary = tokenizer.get_vocab()
        self.closing = {i for token, i in vocabulary.items() if ">" in token}
        placeholders = [
            "<|image_pad|>",
            "<|video_pad|>",
            "<|vision_start|>",
            "<|vision_end|>",
        ]
        size = model.config.get_text_config().vocab_size
        self.ban = torch.zeros(size, device=self.device)
        self.ban[to_ids(placeholders)] = NEVER
        self.ban[len(tokenizer) :] = NEVER

    def encode(self, messages: list, images=(), after_action: bool = False) -> list[int]:
        """Chat messages -> ids, with as many image tokens for each image as the model will see."""
        processor = self.image_processor
        waiting = iter(images)
        ids = []
        for token in encode(self.tokenizer, messages, after_action):
            count = 1
            if token == self.image_token:
                image = next(waiting)
                patches = processor.get_number_of_image_patches(image.height, image.width)
                count = patches // processor.merge_size**2
            ids += [token] * count
        return ids

    def pixels(self, images: list):
        """PIL images -> patches (patches, features) or None, and grid (images, 3): t, h, w."""
        if not images:
            return None, torch.zeros(0, 3, dtype=torch.long)
        out = self.image_processor(images=list(images), return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def positions(self, ids: list[int], grid) -> torch.Tensor:
        """Rotary positions (3, T) of one sequence, as the model itself counts them."""
        if not len(grid):
            return torch.arange(len(ids)).expand(3, -1)
        row = torch.tensor([ids])
        kinds = (row == self.image_token).int()
        positions, _ = self.model.model.get_rope_index(
            row,
            mm_token_type_ids=kinds,
            image_grid_thw=grid,
        )
        return positions[:, 0]

    def batch(self, trajectories: list, side: str) -> dict:
        """What the model's forward takes, padded on one side: ids and masks (B, T), images."""
        rows = [torch.tensor(t.tokens) for t in trajectories]
        real = [torch.ones_like(row) for row in rows]
        ids = padded(rows, side, self.end).to(self.device)
        images = [image for t in trajectories for image in t.images]
        pixels, grid = self.pixels(images)
        inputs = dict(
            input_ids=ids,
            attention_mask=padded(real, side, 0).to(self.device),
            mm_token_type_ids=(ids == self.image_token).int(),
        )
        if images:
            inputs.update(
                pixel_values=pixels.to(self.device, self.model.dtype),
                image_grid_thw=grid.to(self.device),
            )
        return inputs

    def sample(self, logits, limits, uniform):
        """Draw a token for each row.

        logits: (B, V). limits: temperature (0: greedy), top_p, top_k. uniform: (B,), random numbers
        in 0..1. Returns tokens (B,) and their log-probs (B,) under the temperature alone.
        """
        greedy = limits.temperature == 0
        scaled = logits.float() / (1.0 if greedy else limits.temperature)
        logprobs = (scaled + self.ban).log_softmax(-1)
        if greedy:
            tokens = logprobs.argmax(-1)
        else:
            tokens = draw(
                logprobs.exp(),
                limits.top_p,
                limits.top_k,
                uniform,
            )
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    def stops(self, ids: list[int]) -> bool:
        """Does the last id end the action: an end of turn, or the end of a closing tag?"""
        if ids[-1] in self.ends:
            return True
        if ids[-1] not in self.closing:
            return False
        tail = self.tokenizer.decode(ids[-16:])
        return any(tag in tail for tag in CLOSING_TAGS)

    @torch.no_grad()
    def act(self, trajectories: list, limits, on_action):
        """Sample one turn for each trajectory.

        limits: rollout.Limits. on_action(trajectory, Action) is called the moment a row stops; it
        may append to the trajectory. Each step draws one random number a row, also for rows that
        have stopped, so that what a row samples does not depend on when others stop.
        """
        from transformers import GenerationConfig, StoppingCriteriaList  # slow to import

        inputs = self.batch(trajectories, side="left")
        budgets = [limits.new_tokens(t) for t in trajectories]
        actions = [Action([], []) for _ in trajectories]
        live = [True] * len(trajectories)

        def choose(_, logits):
            """Sample a token for each row, and give no other a chance in the greedy search."""
            uniform = torch.rand(
                len(live),
                generator=self.generator,
                device=self.device,
            )
            tokens, logprobs = self.sample(logits, limits, uniform)
            for row, action in enumerate(actions):
                if not live[row]:
                    continue
                action.ids.append(int(tokens[row]))
                action.logprobs.append(float(logprobs[row]))
                action.complete = self.stops(action.ids)
                if action.complete or len(action.ids) == budgets[row]:
                    live[row] = False
                    on_action(trajectories[row], action)
            chosen = torch.full_like(logits, -torch.inf)
            return chosen.scatter(1, tokens[:, None], 0.0)

        def stopped(ids, _):
            done = [not alive for alive in live]
            return torch.tensor(done, device=ids.device)

        # Explicit where a checkpoint's own generation settings would change the distribution.
        settings = GenerationConfig(
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=max(budgets),
            pad_token_id=self.end,
            eos_token_id=sorted(self.ends),
        )
        self.model.generate(
            **inputs,
            generation_config=settings,
            logits_processor=[choose],
            stopping_criteria=StoppingCriteriaList([stopped]),
        )

    def logprobs(self, trajectories: list, temperature: float = 1.0):
        """Log-probs (A,) of all action tokens, in order, with gradients; and entropies (A,)."""
        inputs = self.batch(trajectories, side="right")
        masks = [torch.tensor(t.action_mask) for t in trajectories]
        actions = padded(masks, "right", False).to(self.device)[:, 1:]  # (B, T - 1)
        targets = inputs["input_ids"][:, 1:][actions]  # (A,)
        logits = self.model(**inputs, use_cache=False).logits
        logits = logits[:, :-1][actions]  # (A, V)
        scaled = logits.float() / temperature
        logprobs = (scaled + self.ban).log_softmax(-1)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        chosen = logprobs.gather(1, targets[:, None])[:, 0]
        return chosen, entropy.detach()


def padded(rows: list, side: str, value):
    """Tensors of unequal length -> (B, T), padded on one side."""
    return pad_sequence(
        rows,
        batch_first=True,
        padding_value=value,
        padding_side=side,
    )


def draw(probabilities, top_p: float, top_k: int, uniform):
    """Tokens (B,) from probabilities (B, V), by the inverse of the cumulative distribution.

    It costs a twentieth of torch.multinomial at V = 152k. top_k=0 and top_p=1 keep all tokens.
    """
    order = None
    if top_k or top_p < 1:
        vocabulary = probabilities.shape[1]
        probabilities, order = probabilities.topk(min(top_k or vocabulary, vocabulary))
        before = probabilities.cumsum(-1) - probabilities
        most = top_p * probabilities.sum(-1, keepdim=True)
        probabilities = probabilities * (before < most)
    total = probabilities.cumsum(-1)
    point = uniform[:, None] * total[:, -1:] * (1 - 1e-6)
    place = torch.searchsorted(total, point, right=True)
    if order is not None:
        place = order.gather(1, place)
    return place[:, 0]


def load_policy(
    name,
    device=None,
    dtype=None,
    max_pixels: int = 2_000_000,
    sharded: bool = False,
) -> Policy:
    """A checkpoint folder, a run's folder (its newest step_N), or a hub name -> Policy.

    dtype: bfloat16 on a GPU and float32 on a CPU, unless given. max_pixels: of an image, as the
    model sees it. sharded: only process 0 reads the weights, into main memory, and
    engine.parallel.shard must follow. Raises DataError where the checkpoint is not there, lacks
    something, or is of another family.
    """
    best = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device or best)
    parts = load_parts(checkpoint_folder(name), device, dtype, max_pixels, sharded)
    return Policy(*parts, device)


def tiny_policy(folder, texts: list[str], seed: int = 0, vocabulary: int = 1024) -> Policy:
    """Write a random policy of 0.8 M parameters (engine/tiny.py) to `folder` and load it."""
    write_tiny_policy(folder, texts, seed, vocabulary)
    return load_policy(folder)
