"""Training: schedule, loss, step, loop, stages and the hooks around them."""
