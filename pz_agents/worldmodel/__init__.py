"""UniZero for text: a transformer world model over observations and actions that are texts.

``network`` is the model, ``texts`` what it reads, ``scalars`` how numbers become categories,
``targets`` and ``losses`` what it learns from, ``replay`` what is remembered, ``learner`` the
update, ``imagination`` the model as something the tree search can step. Source: Pu et al. 2024,
"UniZero" (arXiv 2406.10667), with the changes that each file names.
"""
