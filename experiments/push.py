"""Uploads the agent of a finished run to the Hugging Face hub, with a model card written from the run.

    appo push --run runs/mnli-... --repo me/mnli-agent --dry-run      write the card, list what would be uploaded
    appo push --run runs/mnli-... --repo me/mnli-agent --private
    appo push --run runs/mnli-... --repo me/mnli-agent --merge        an adapter and its base, as one plain model

The card is agent/README.md in the run's folder. A card that is already there is kept: add to it, such as a licence,
between the dry run and the upload. With --merge the model and its card are in merged/ instead; use --dry-run to get the
merged model without an upload. The token comes from `hf auth login` or from HF_TOKEN.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.hub.upload import CARD, check_name, upload, write_card
from experiments.run.folder import RESULT, finished
from experiments.terminal.command import Parser, in_order
from tasks.errors import printable


@in_order
def main(argv: Sequence[str]) -> int:
    """Writes the card and uploads the agent, or lists its files; returns the exit code."""
    parser = Parser("appo push", __doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="the agent's name on the hub")
    parser.add_argument("--private", action="store_true", help="create a repository that only its owner sees")
    parser.add_argument("--merge", action="store_true", help="merge an adapter with its base, in the folder merged")
    parser.add_argument("--dry-run", action="store_true", help="write the card and list the files, without a network")
    options = parser.parse_args(argv)
    check_name(options.repo)
    config, result = finished(options.run)
    agent = options.run / ("merged" if options.merge else "agent")
    if options.merge:
        from experiments.run.models import save_merged  # takes seconds to load

        save_merged(options.run / "agent", agent)
    kept = "" if write_card(config, result, agent, options.repo) else "; it was there already and is kept"
    if kept and (agent / CARD).stat().st_mtime < (options.run / RESULT).stat().st_mtime:
        kept += ", though the run has a newer result: delete the card to have it written anew"
    print(f"card: {printable(str(agent / CARD))}{kept}", file=sys.stderr)
    if options.dry_run:
        for path in sorted(path for path in agent.rglob("*") if path.is_file()):
            print(f"{path.stat().st_size:>12,}  {printable(str(path.relative_to(agent)))}")
        return 0
    print(upload(agent, options.repo, options.private))
    return 0


if __name__ == "__main__":
    sys.exit(main())
