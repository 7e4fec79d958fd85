"""``dualtok doctor``: what goes wrong on clusters, looked for before a run loses hours to it.

One function per check; each returns a :class:`~dualtok.doctor.result.CheckResult`. ``examine.py`` says which are made,
``agent.py`` makes those of one host over ssh, ``rank_checks.py`` those that need several ranks.
"""
