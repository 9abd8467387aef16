"""What is known of licenses: a table of facts, and nothing else.

Facts, not advice, in words of our own; numbers in brackets are sections of the license. They were read on
2026-11-24 in ScanCode LicenseDB (commit 053a651f5e, of 2026-02-24) and in ScanCode toolkit (commits
4e6f075e4d and f54a624a5d, for Llama 3 and Qwen RESEARCH), which keep the texts that ``source`` publishes; the
Hub's ids in huggingface/hub-docs (commit 242f4a1eeb, of 2026-08-22); and what Llama 3.2 and 4 say on the
European Union in their Acceptable Use Policies. A license that is not here is unknown, not harmless.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

#: ``permissive`` and ``copyleft`` are open licenses; ``restricted`` is every other, and every unknown one.
Kind: TypeAlias = Literal["permissive", "copyleft", "restricted"]


@dataclass(frozen=True, slots=True)
class Terms:
    """One license.

    ``spdx`` is its SPDX id or a LicenseRef, ``hub`` its id on the Hub, ``aliases`` what cards call it in
    ``license_name``. ``dated`` is the date of the text, ``title`` its first lines in lower case, ``digests``
    the SHA-256 of its whole text in normal form. ``notice`` has to stand in a Notice file and ``display`` in
    the documentation; names of fine-tunes have to begin with ``prefix``.
    """

    spdx: str
    name: str
    kind: Kind
    hub: str = ""
    aliases: tuple[str, ...] = ()
    dated: str = ""
    source: str = ""
    obligations: tuple[str, ...] = ()
    notice: str = ""
    display: str = ""
    prefix: str = ""
    title: tuple[str, ...] = ()
    digests: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether it is known to be an open license."""
        return self.kind != "restricted"


#: What an entry without facts asks.
UNKNOWN = "What it asks is not known here: read it."

_HUB = "https://huggingface.co/"

_QWEN = (
    Terms(
        "LicenseRef-scancode-qwen-2024",
        "Qwen LICENSE AGREEMENT",
        "restricted",
        aliases=("qwen",),
        dated="2024-09-19",
        source=_HUB + "Qwen/Qwen2.5-72B/blob/main/LICENSE",
        obligations=(
            "Give every recipient a copy of the agreement (3a).",
            "Put a prominent notice of the change into each file that you changed (3b).",
            "Keep the attribution notice in a text file called Notice (3c).",
            "Ask Alibaba Cloud for a license before commercial use in a product or service with more than "
            "100 million monthly active users (4).",
            'Show "Built with Qwen" or "Improved using Qwen" in the documentation of every model that you '
            "make or improve with it or its outputs and pass on (5b).",
        ),
        notice="Qwen is licensed under the Qwen LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. "
        "All Rights Reserved.",
        display="Built with Qwen",
        title=("qwen license agreement", "qwen license agreement release date: september 19, 2024"),
    ),
    Terms(
        "LicenseRef-scancode-qwen-research-2024",
        "Qwen RESEARCH LICENSE AGREEMENT",
        "restricted",
        aliases=("qwen-research",),
        dated="2024-09-19",
        source=_HUB + "Qwen/Qwen2.5-3B/blob/main/LICENSE",
        obligations=(
            "Use it for research and evaluation only; ask Alibaba Cloud for a license before any commercial "
            "use (1i, 2).",
            "Give every recipient a copy of the agreement (3a).",
            "Put a prominent notice of the change into each file that you changed (3b).",
            "Keep the attribution notice in a text file called Notice (3c).",
            'Show "Built with Qwen" or "Improved using Qwen" in the documentation of every model that you '
            "make or improve with it or its outputs and pass on (4b).",
        ),
        notice="Qwen is licensed under the Qwen RESEARCH LICENSE AGREEMENT, Copyright (c) Alibaba Cloud. "
        "All Rights Reserved.",
        display="Built with Qwen",
        title=(
            "qwen research license agreement",
            "qwen research license agreement release date: september 19, 2024",
        ),
    ),
    Terms(
        "LicenseRef-scancode-tongyi-qianwen-2023",
        "Tongyi Qianwen LICENSE AGREEMENT",
        "restricted",
        aliases=("tongyi-qianwen",),
        dated="2023-08-03",
        source=_HUB + "Qwen/Qwen2-72B-Instruct/blob/main/LICENSE",
        obligations=(
            "Give every recipient a copy of the agreement (3a).",
            "Put a prominent notice of the change into each file that you changed (3b).",
            "Keep the attribution notice in a text file called Notice (3c).",
            "Ask Alibaba Cloud for a license before commercial use in a product or service with more than "
            "100 million monthly active users (4).",
            "Do not improve other large language models with it or its outputs, only Tongyi Qianwen and what "
            "derives from it (5b).",
        ),
        notice="Tongyi Qianwen is licensed under the Tongyi Qianwen LICENSE AGREEMENT, Copyright (c) Alibaba "
        "Cloud. All Rights Reserved.",
        title=("tongyi qianwen license agreement", "tongyi qianwen release date: august 3, 2023"),
    ),
)

_LLAMA_NOTICE = "Keep the attribution notice in a text file called Notice (1.b.iii)."
_LLAMA_USE = "Keep to the Acceptable Use Policy and to the law (1.b.iv)."
_LLAMA_USERS = (
    "Ask Meta for a license if your products and services had more than 700 million monthly active users in "
    "the month before the version's release (2)."
)
_LLAMA_EU = (
    "Its multimodal models are not licensed to anybody domiciled in the European Union, nor to companies "
    "with their principal place of business there; end users of products are exempt (Acceptable Use Policy)."
)


def _no_other_models(llama: str) -> str:
    return (
        f"Do not improve other large language models with it or its outputs, only {llama} and what derives "
        "from it (1.b.v)."
    )


def _built_with(display: str, prefix: str) -> tuple[str, ...]:
    return (
        "Give every recipient a copy of the agreement (1.b.i).",
        f'Show "{display}" prominently on a website, user interface, blog post or about page, or in the '
        "documentation (1.b.i).",
        f'Let the name of every model that you make or improve with it and pass on begin with "{prefix}" '
        "(1.b.i).",
    )


def _attribution(llama: str) -> str:
    return (
        f"{llama} is licensed under the {llama} Community License, Copyright © Meta Platforms, Inc. "
        "All Rights Reserved."
    )


def _llama_3(version: str, spdx: str, dated: str, released: str, *more: str) -> Terms:
    """Llama 3.1 and later, which differ in little."""
    return Terms(
        f"LicenseRef-scancode-{spdx}",
        f"Llama {version} Community License Agreement",
        "restricted",
        hub=f"llama{version}",
        dated=dated,
        source=f"https://github.com/meta-llama/llama-models/blob/main/models/llama{version.replace('.', '_')}"
        "/LICENSE",
        obligations=(
            *_built_with("Built with Llama", "Llama"),
            _LLAMA_NOTICE,
            _LLAMA_USE,
            _LLAMA_USERS,
            *more,
        ),
        notice=_attribution(f"Llama {version}"),
        display="Built with Llama",
        prefix="Llama",
        title=(f"llama {version} community license agreement", f"llama {version} version {released}"),
    )


_LLAMA = (
    Terms(
        "LicenseRef-scancode-llama-2-license-2023",
        "Llama 2 Community License Agreement",
        "restricted",
        hub="llama2",
        dated="2023-07-18",
        source="https://github.com/facebookresearch/llama/blob/main/LICENSE",
        obligations=(
            "Give every recipient a copy of the agreement (1.b.i).",
            _LLAMA_NOTICE,
            _LLAMA_USE,
            _no_other_models("Llama 2"),
            _LLAMA_USERS,
        ),
        notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
        "All Rights Reserved.",
        title=("llama 2 community license agreement", "llama 2 version release date: july 18, 2023"),
    ),
    Terms(
        "LicenseRef-scancode-llama-3-license-2024",
        "Meta Llama 3 Community License Agreement",
        "restricted",
        hub="llama3",
        dated="2024-04-18",
        source="https://github.com/meta-llama/llama3/blob/main/LICENSE",
        obligations=(
            *_built_with("Built with Meta Llama 3", "Llama 3"),
            _LLAMA_NOTICE,
            _LLAMA_USE,
            _no_other_models("Meta Llama 3"),
            _LLAMA_USERS,
        ),
        notice=_attribution("Meta Llama 3"),
        display="Built with Meta Llama 3",
        prefix="Llama 3",
        title=(
            "meta llama 3 community license agreement",
            "meta llama 3 version release date: april 18, 2024",
        ),
    ),
    _llama_3("3.1", "llama-3.1-license-2024", "2024-07-23", "release date: july 23, 2024"),
    _llama_3("3.2", "llama-3.2-license-2024", "2024-09-25", "release date: september 25, 2024", _LLAMA_EU),
    _llama_3("3.3", "llama-3.3-license-2024", "2024-12-06", "release date: december 6, 2024"),
    _llama_3("4", "llama-4-cla-2025", "2025-04-05", "effective date: april 5, 2025", _LLAMA_EU),
)

_GEMMA_2025 = Terms(
    "LicenseRef-scancode-gemma-tou-2025-03-24",
    "Gemma Terms of Use",
    "restricted",
    hub="gemma",
    dated="2025-03-24",
    source="https://ai.google.dev/gemma/terms",
    obligations=(
        "Make the use restrictions of section 3.2 an enforceable part of your own terms, and tell recipients "
        "of them (3.1).",
        "Give every recipient a copy of the terms (3.1).",
        "Put a prominent notice of the change into each file that you changed (3.1).",
        "Add the notice in a text file called Notice (3.1).",
        "Keep to the Gemma Prohibited Use Policy and to the law (3.2).",
    ),
    notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    title=("gemma terms of use", "last modified: march 24, 2025"),
)
_GEMMA = (
    _GEMMA_2025,  # the newest comes first: a card does not say which
    replace(
        _GEMMA_2025,
        spdx="LicenseRef-scancode-gemma-tou-2024-04-01",
        dated="2024-04-01",
        title=("gemma terms of use", "last modified: april 1, 2024"),
    ),
)

_RAIL_OBLIGATIONS = (
    "Make the use restrictions of paragraph 5 an enforceable part of your own terms, and tell recipients of "
    "them (4a).",
    "Give every recipient a copy of the license (4b).",
    "Put a prominent notice of the change into each file that you changed (4c).",
    "Keep all copyright, patent, trademark and attribution notices (4d).",
    "Do not use it for what attachment A excludes, and require the same of your users (5).",
)
_RAIL = (
    Terms(
        "LicenseRef-scancode-bigscience-open-rail-m",
        "BigScience Open RAIL-M License",
        "restricted",
        hub="bigscience-openrail-m",
        dated="2022-08-18",
        source="https://www.licenses.ai/blog/2022/8/26/bigscience-open-rail-m-license",
        obligations=_RAIL_OBLIGATIONS,
        title=("bigscience open rail-m license", "dated august 18, 2022"),
    ),
    Terms(
        "LicenseRef-scancode-bigscience-rail-1.0",
        "BigScience RAIL License v1.0",
        "restricted",
        hub="bigscience-bloom-rail-1.0",
        dated="2022-05-19",
        source=_HUB + "spaces/bigscience/license",
        obligations=_RAIL_OBLIGATIONS,
        title=("bigscience rail license v1.0", "dated may 19, 2022"),
    ),
    Terms(
        "LicenseRef-scancode-stable-diffusion-2022-08-22",
        "CreativeML Open RAIL-M",
        "restricted",
        hub="creativeml-openrail-m",
        dated="2022-08-22",
        source="https://github.com/CompVis/stable-diffusion/blob/main/LICENSE",
        obligations=_RAIL_OBLIGATIONS,
        title=("creativeml open rail-m", "dated august 22, 2022"),
    ),
    Terms(
        "LicenseRef-scancode-bigscience-open-rail-m2",
        "CreativeML Open RAIL++-M License",
        "restricted",
        hub="openrail++",
        dated="2022-11-24",
        source="https://raw.githubusercontent.com/Stability-AI/stablediffusion/main/LICENSE-MODEL",
        obligations=_RAIL_OBLIGATIONS,
        title=("creativeml open rail++-m license", "dated november 24, 2022"),
    ),
    Terms(
        "LicenseRef-scancode-bigcode-open-rail-m-v1",
        "BigCode Open RAIL-M v1 License Agreement",
        "restricted",
        hub="bigcode-openrail-m",
        source=_HUB + "spaces/bigcode/bigcode-model-license-agreement",
        obligations=(
            "Do not use it for what attachment A excludes (4).",
            "Put paragraph 4 and the restrictions of attachment A, or ones of the same purpose, into the "
            "license under which you share it (5.1).",
            "Give every recipient a copy of the agreement (5.2a).",
            "Keep the model's documentation, and document your changes as well as it does (5.2b).",
            "Keep all copyright, patent, trademark and attribution notices (5.2c).",
        ),
        title=("bigcode open rail-m v1 license agreement",),
    ),
    Terms(
        "LicenseRef-scancode-deepseek-la-1.0",
        "DeepSeek License Agreement, Version 1.0",
        "restricted",
        aliases=("deepseek", "deepseek-license"),
        dated="2023-10-23",
        source="https://github.com/deepseek-ai/DeepSeek-V3/blob/main/LICENSE-MODEL",
        obligations=_RAIL_OBLIGATIONS,
        title=("deepseek license agreement", "version 1.0, 23 october 2023"),
    ),
)

_FALCON = Terms(
    "LicenseRef-scancode-falcon-2-11b-1.0",
    "Falcon 2 11B TII License Version 1.0",
    "restricted",
    dated="2024-05",
    source="https://falconllm-staging.tii.ae/falcon-2-terms-and-conditions.html",
    obligations=(
        "Make the use restrictions of the Acceptable Use Policy an enforceable part of your own terms (4).",
        "Give every recipient a copy of the license (4).",
        "Put a prominent notice of the change into each file that you changed (4).",
        "Keep all copyright, patent, trademark and attribution notices, and those of a NOTICE file (4).",
        "Keep to the Acceptable Use Policy, in its latest version (5).",
        'Say in every public statement on your model that it "is built using Falcon LLM technology from the '
        'Technology Innovation Institute" (6).',
    ),
    title=("falcon 2 11b tii license version 1.0",),
)

_OPEN = (
    Terms(
        "Apache-2.0",
        "Apache License, Version 2.0",
        "permissive",
        hub="apache-2.0",
        dated="2004-01",
        source="https://www.apache.org/licenses/LICENSE-2.0",
        obligations=(
            "Give every recipient a copy of the license (4a).",
            "Put a prominent notice of the change into each file that you changed (4b).",
            "Keep all copyright, patent, trademark and attribution notices (4c).",
            "Pass on the attributions of a NOTICE file, if there is one (4d).",
        ),
        digests=(
            "1fe9d8083e812cea00051ca5a44bacbb0199f0e48b3022969727a5e934591cde",
            "abb0de7ae7ed48c02eb8e17b79f81cc10d10b2bb50778f53ccef8d37b10b70f9",
        ),
    ),
    Terms(
        "MIT",
        "MIT License",
        "permissive",
        hub="mit",
        source="https://spdx.org/licenses/MIT.html",
        obligations=("Pass on the copyright notice and the permission notice with every copy.",),
        digests=("56959050891f7b737ac4e803051170c7197f02df73d80bd9a78d968e305bf558",),
    ),
    Terms(
        "BSD-2-Clause",
        'BSD 2-Clause "Simplified" License',
        "permissive",
        hub="bsd-2-clause",
        source="https://spdx.org/licenses/BSD-2-Clause.html",
        obligations=("Pass on the copyright notice, the conditions and the disclaimer (1, 2).",),
        digests=("11cf92b65eda2f9cd73e18d3066283da5c37dd1f10edf0e3ac9889ac7634fe65",),
    ),
    Terms(
        "BSD-3-Clause",
        'BSD 3-Clause "New" or "Revised" License',
        "permissive",
        hub="bsd-3-clause",
        source="https://spdx.org/licenses/BSD-3-Clause.html",
        obligations=(
            "Pass on the copyright notice, the conditions and the disclaimer (1, 2).",
            "Do not use the authors' names to promote what you made of it without their permission (3).",
        ),
        digests=("f7737e83d7d22d6fcf82026dec12bd6d8a182362b207e402117edff1f58bcad4",),
    ),
)


def _creative_commons(elements: str, words: str) -> Terms:
    """A Creative Commons license, version 4.0, from its elements: ``by-nc-sa``."""
    obligations = [
        "Name the creators, keep the notices of copyright, license and warranty, and link to the original "
        "(3a1A).",
        "Say that you changed it (3a1B).",
        "Say that it is under this license, and add its text or a link to it (3a1C).",
    ]
    if "nc" in elements:
        obligations.append("Do not use or share it for commercial purposes (2a1).")
    if "sa" in elements:
        obligations.append("Share what you make of it under the same or a compatible license (3b1).")
    if "nd" in elements:
        obligations.append("Do not share changed versions of it (2a1B).")
    open_kind: Kind = "copyleft" if "sa" in elements else "permissive"
    return Terms(
        f"CC-{elements.upper()}-4.0",
        f"Creative Commons {words} 4.0 International",
        "restricted" if "nc" in elements or "nd" in elements else open_kind,
        hub=f"cc-{elements}-4.0",
        source=f"https://creativecommons.org/licenses/{elements}/4.0/legalcode",
        obligations=tuple(obligations),
        title=(f"{words.lower()} 4.0 international",),
    )


_CREATIVE_COMMONS = (
    _creative_commons("by", "Attribution"),
    _creative_commons("by-sa", "Attribution-ShareAlike"),
    _creative_commons("by-nc", "Attribution-NonCommercial"),
    _creative_commons("by-nc-sa", "Attribution-NonCommercial-ShareAlike"),
    _creative_commons("by-nd", "Attribution-NoDerivatives"),
    _creative_commons("by-nc-nd", "Attribution-NonCommercial-NoDerivatives"),
)

#: The other ids of the Hub: id, SPDX id, kind. What they ask is not in the table: read them. Where the Hub's
#: id stands for a family, or SPDX has none, a LicenseRef takes its place.
_OTHER_HUB_IDS = """
afl-3.0                    AFL-3.0                                  permissive
agpl-3.0                   AGPL-3.0                                 copyleft
apple-amlr                 LicenseRef-apple-amlr                    restricted
apple-ascl                 LicenseRef-apple-ascl                    restricted
artistic-2.0               Artistic-2.0                             copyleft
bsd                        LicenseRef-bsd                           permissive
bsd-3-clause-clear         BSD-3-Clause-Clear                       permissive
bsl-1.0                    BSL-1.0                                  permissive
c-uda                      C-UDA-1.0                                restricted
cc                         LicenseRef-cc                            restricted
cc-by-2.0                  CC-BY-2.0                                permissive
cc-by-2.5                  CC-BY-2.5                                permissive
cc-by-3.0                  CC-BY-3.0                                permissive
cc-by-nc-2.0               CC-BY-NC-2.0                             restricted
cc-by-nc-3.0               CC-BY-NC-3.0                             restricted
cc-by-nc-nd-3.0            CC-BY-NC-ND-3.0                          restricted
cc-by-nc-sa-2.0            CC-BY-NC-SA-2.0                          restricted
cc-by-nc-sa-3.0            CC-BY-NC-SA-3.0                          restricted
cc-by-sa-3.0               CC-BY-SA-3.0                             copyleft
cc0-1.0                    CC0-1.0                                  permissive
cdla-permissive-1.0        CDLA-Permissive-1.0                      permissive
cdla-permissive-2.0        CDLA-Permissive-2.0                      permissive
cdla-sharing-1.0           CDLA-Sharing-1.0                         copyleft
deepfloyd-if-license       LicenseRef-deepfloyd-if-license          restricted
ecl-2.0                    ECL-2.0                                  permissive
epl-1.0                    EPL-1.0                                  copyleft
epl-2.0                    EPL-2.0                                  copyleft
etalab-2.0                 etalab-2.0                               permissive
eupl-1.1                   EUPL-1.1                                 copyleft
eupl-1.2                   EUPL-1.2                                 copyleft
fair-noncommercial-research-license LicenseRef-fair-noncommercial-research-license restricted
gfdl                       LicenseRef-gfdl                          copyleft
gpl                        LicenseRef-gpl                           copyleft
gpl-2.0                    GPL-2.0                                  copyleft
gpl-3.0                    GPL-3.0                                  copyleft
grok2-community            LicenseRef-grok2-community               restricted
h-research                 LicenseRef-h-research                    restricted
intel-research             LicenseRef-intel-research                restricted
isc                        ISC                                      permissive
lgpl                       LicenseRef-lgpl                          copyleft
lgpl-2.1                   LGPL-2.1                                 copyleft
lgpl-3.0                   LGPL-3.0                                 copyleft
lgpl-lr                    LGPLLR                                   copyleft
lppl-1.3c                  LPPL-1.3c                                copyleft
mpl-2.0                    MPL-2.0                                  copyleft
ms-pl                      MS-PL                                    copyleft
ncsa                       NCSA                                     permissive
odbl                       ODbL-1.0                                 copyleft
odc-by                     ODC-By-1.0                               permissive
ofl-1.1                    OFL-1.1                                  copyleft
openmdw-1.0                LicenseRef-scancode-openmdw-1.0          permissive
openmdw-1.1                LicenseRef-openmdw-1.1                   restricted
openrail                   LicenseRef-openrail                      restricted
osl-3.0                    OSL-3.0                                  copyleft
pddl                       PDDL-1.0                                 permissive
postgresql                 PostgreSQL                               permissive
unlicense                  Unlicense                                permissive
wtfpl                      WTFPL                                    permissive
zlib                       Zlib                                     permissive
"""


def _other(row: str) -> Terms:
    hub, spdx, kind = row.split()
    kinds: dict[str, Kind] = {"permissive": "permissive", "copyleft": "copyleft", "restricted": "restricted"}
    return Terms(spdx, spdx.removeprefix("LicenseRef-"), kinds[kind], hub=hub, obligations=(UNKNOWN,))


#: What the table knows in full: names, obligations, sources.
KNOWN: tuple[Terms, ...] = (*_QWEN, *_LLAMA, *_GEMMA, *_RAIL, _FALCON, *_OPEN, *_CREATIVE_COMMONS)

#: What it knows by id alone.
LISTED: tuple[Terms, ...] = tuple(_other(row) for row in _OTHER_HUB_IDS.strip().splitlines())
