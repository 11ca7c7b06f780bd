"""What a finished run says: how good the model is, beside what needs no model, and what it writes."""

from rich.console import Console
from rich.text import Text

from mmx_jax.config import RunConfig, StageConfig
from mmx_jax.data import TokenStore, baselines
from mmx_jax.evaluation import TaskResult, result_table
from mmx_jax.inference import Generator, SamplingConfig
from mmx_jax.inference.load import load_for_inference, with_tokenizer
from mmx_jax.training.hooks import LOSS_CURVE

SAMPLING = SamplingConfig(temperature=0.7, top_p=0.95)


def final_report(console: Console, config: RunConfig, stage: StageConfig, workdir: str, held_out: TaskResult) -> None:
    """Prints held-out figures, baselines, continuations, the path of the loss curve and what to try next."""
    console.print()
    if len(held_out.groups) > 2:
        console.print(result_table(held_out))
    for prompt, continuation in continuations(config, workdir):
        console.rule("a continuation", align="left", style="dim")
        console.print(Text(prompt, style="bold") + Text(continuation, style="none"))
    console.rule(style="dim")
    figure = held_out.groups["all"]["bits_per_byte"]
    _say(console, f"held-out bits per byte: {figure:.4f}")
    if config.report.baselines:
        for name, value in baseline_rows(config, stage):
            _say(console, f"  {name:<42}{value:.4f}")
    _say(console, f"loss curve: {workdir}/{LOSS_CURVE}")
    for line in config.report.next_commands:
        _say(console, line.format(workdir=workdir))


def _say(console: Console, line: str) -> None:
    """Prints a line as it is: names and paths may hold what rich takes for markup."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def baseline_rows(config: RunConfig, stage: StageConfig) -> list[tuple[str, float]]:
    """Bits per byte of what needs no network, on the same held-out text, by store."""
    rows = []
    stores = dict.fromkeys(source.store for source in stage.data.sources)
    for folder in stores:
        train, held_out = TokenStore(folder), TokenStore(folder, split="held_out")
        found = baselines(train, held_out, max_tokens=config.evaluation.max_tokens)
        where = f" ({folder})" if len(stores) > 1 else ""
        rows.append((f"xz -9 on the same text{where}", found.xz))
        rows.append((f"bigram table of the same tokens{where}", found.bigram))
        rows.append((f"unigram table of the same tokens{where}", found.unigram))
    return rows


def continuations(config: RunConfig, workdir: str) -> list[tuple[str, str]]:
    """Each prompt with what the saved model makes of it."""
    if not config.report.prompts:
        return []
    loaded, tokenizer = with_tokenizer(load_for_inference(workdir))
    generator = Generator(loaded.model, loaded.params)
    prompts = [tokenizer.encode(prompt) for prompt in config.report.prompts]
    outputs = generator.generate(prompts, SAMPLING, config.report.max_new_tokens)
    return [
        (prompt, tokenizer.decode(output, continuation=True)) for prompt, output in zip(config.report.prompts, outputs)
    ]
