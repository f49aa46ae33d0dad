"""ScienceWorld: thirty elementary-science tasks in a simulated house, on the published engine.

The engine is the jar of the ``scienceworld`` package (Apache-2.0), hosted by one Java process for
all environments of a Python process.
"""
