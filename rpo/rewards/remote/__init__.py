"""Rewards of another process, asked by JSON over HTTP: `rpo serve-rewards` there, `http://HOST:PORT/NAME` here.

`form` says what is sent, `unirl` the same as the public UniRL reward service has it, `exchange` is one request within
its bounds, `client` the reward that asks, `served` a reward that is asked, `server` what listens. Nothing is pickled.
"""
