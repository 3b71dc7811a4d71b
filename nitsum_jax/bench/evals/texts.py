"""The texts of references that this tool makes: prose, code, and what is neither."""

TEXTS: tuple[tuple[str, str], ...] = (
    (
        "prose",
        "The ferry left the island a little after six, when the harbour lamps were still burning and the first gulls "
        "had begun to quarrel over the nets. Nobody on deck spoke much. An old man in a yellow coat counted the boats "
        "that stayed behind, as he had done every morning for thirty years, and wrote the number in a small notebook. "
        "By the time the sun stood over the breakwater, the coast was only a grey line, and the children who had come "
        "to wave had gone home to breakfast.",
    ),
    (
        "code",
        "def merge(left: list[int], right: list[int]) -> list[int]:\n"
        '    """Merges two sorted lists."""\n'
        "    result = []\n"
        "    i = j = 0\n"
        "    while i < len(left) and j < len(right):\n"
        "        if left[i] <= right[j]:\n"
        "            result.append(left[i])\n"
        "            i += 1\n"
        "        else:\n"
        "            result.append(right[j])\n"
        "            j += 1\n"
        "    return result + left[i:] + right[j:]\n",
    ),
    (
        "numbers and names",
        "On 14 March 1879, at 11:30 in the morning, Albert Einstein was born in Ulm, Germany. In 1905 he published "
        "four papers; one of them holds the formula E = mc². Prices rose by 3.7 % to €12,480.50 — the ¥ fell to 157.2. "
        "Straße, naïve, Ωmega, 東京, привет 👋",
    ),
)
