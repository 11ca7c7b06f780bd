"""The loop."""

import contextlib

import jax

from mmx_jax.training.session import Session


def train(session: Session) -> None:
    """Trains a stage from where it is to the end of its budget.

    Batch size, learning rate and rows of each update follow from `session.progress`; the devices always have the next
    update before the host looks at the last one's figures. Everything else is a hook.
    """
    with contextlib.ExitStack() as stack, jax.set_mesh(session.mesh):
        stack.callback(session.feed.close)
        for hook in session.hooks:
            stack.callback(hook.close)
        for hook in session.hooks:
            hook.start(session)
        while not session.finished:
            session.advance()
            for hook in session.hooks:
                hook.update(session)
        session.settle()
        for hook in session.hooks:
            hook.finish(session)
