"""Every wording of every question: those trained on, and those held out for `paraphrase="held_out"`."""

from __future__ import annotations


def _table(seen: str, held_out: str) -> dict[str, tuple[str, ...]]:
    return {"seen": tuple(filter(None, map(str.strip, seen.splitlines()))),
            "held_out": tuple(filter(None, map(str.strip, held_out.splitlines())))}  # fmt: skip


PARAPHRASES = {
    "what": _table(
        """what is this?
        what is it?
        what is in the picture?
        what is shown here?
        what do you see?
        what can you see?
        what is that?
        what's this?
        what is this thing called?
        name this.
        name the thing in the picture.
        what object is this?
        what does the picture show?
        identify this.
        what is in this image?
        can you tell me what this is?
        which thing is this?
        this is a picture of what?""",
        """what am I looking at?
        what is the thing in this picture?
        what has been drawn here?
        what would you call this?
        tell me what is shown.
        please name what you see.""",
    ),
    "what_kind_name": _table(
        """what {kind} is this?
        which {kind} is this?
        what {kind} is it?
        what {kind} is in the picture?
        what {kind} do you see?
        name the {kind}.
        which {kind} is shown?
        what {kind} can you see?
        what sort of {kind} is this?
        what type of {kind} is this?
        identify the {kind}.
        what is this {kind} called?
        what kind of {kind} is this?""",
        """which {kind} am I looking at?
        what {kind} does the picture show?
        tell me which {kind} this is.
        what is the name of this {kind}?""",
    ),
    "kind": _table(
        """what kind of thing is this?
        what kind of thing is it?
        what sort of thing is this?
        what type of thing is this?
        what is this, in general?
        what category does this belong to?
        what kind of object is in the picture?
        what group does this belong to?
        which category is this?
        is this an animal, food, a vehicle or something else?""",
        """what class of thing is shown here?
        which kind of thing do you see?
        under what category would you put this?""",
    ),
    "kind_of": _table(
        """what kind of thing is {the}?
        what sort of thing is {the}?
        what type of thing is {the}?
        what category does {the} belong to?""",
        """which kind of thing is {the}?
        what class of thing is {the}?""",
    ),
    "is_it": _table(
        """is this {one}?
        is it {one}?
        is that {one}?
        does the picture show {one}?
        is this a picture of {one}?
        is the thing in the picture {one}?
        would you say this is {one}?""",
        """am I looking at {one}?
        could this be {one}?
        is what you see {one}?""",
    ),
    "either": _table(
        """is this {one} or {other}?
        is it {one} or {other}?
        which is it, {one} or {other}?
        do you see {one} or {other}?
        does the picture show {one} or {other}?""",
        """am I looking at {one} or {other}?
        what is this: {one} or {other}?""",
    ),
    "exists": _table(
        """is there {one}?
        is there {one} in the picture?
        can you see {one}?
        do you see {one}?
        does the picture show {one}?
        is {one} in the picture?
        does the image contain {one}?
        is {one} there?
        is there {one} here?
        are there any {many}?
        are there any {many} in the picture?
        do you see any {many}?""",
        """is {one} visible?
        can {one} be seen?
        does this image have {one} in it?
        are any {many} shown here?""",
    ),
    "count": _table(
        """how many {many} are there?
        how many {many} are in the picture?
        how many {many} can you see?
        how many {many} do you see?
        count the {many}.
        what is the number of {many}?
        how many {many} does the picture show?
        how many {many} are there in the picture?""",
        """what number of {many} is shown?
        please count the {many} you see.
        how many {many} can be seen here?""",
    ),
    "count_all": _table(
        """how many things are there?
        how many things are in the picture?
        how many objects are there?
        how many objects can you see?
        count the things.
        how many things are there in all?
        how many items do you see?
        how many different objects are in the image?""",
        """what is the total number of things?
        how many objects can be counted here?
        please count everything in the picture.""",
    ),
    "where": _table(
        """where is {the}?
        where is {the} in the picture?
        in which part of the picture is {the}?
        where can I find {the}?
        where do you see {the}?
        where in the picture is {the}?
        where can {the} be found?""",
        """what part of the picture is {the} in?
        whereabouts is {the}?
        tell me where {the} is.""",
    ),
    "at": _table(
        """what is {place}?
        what is {place} of the picture?
        what can you see {place}?
        what do you see {place}?
        which thing is {place}?
        what is there {place}?""",
        """tell me what is {place}.
        which object stands {place}?""",
    ),
    "beside": _table(
        """what is {side} {the}?
        which thing is {side} {the}?
        what do you see {side} {the}?
        what can be seen {side} {the}?
        what is there {side} {the}?
        which object is {side} {the}?""",
        """tell me what is {side} {the}.
        what stands {side} {the}?""",
    ),
    "side_yes": _table(
        """is {the} {side} {other}?
        is {the} {side} {other} in the picture?
        can you see {the} {side} {other}?
        do you find {the} {side} {other}?""",
        """would you say {the} is {side} {other}?
        does {the} stand {side} {other}?""",
    ),
    "left_right": _table(
        """is {the} to the left or to the right of {other}?
        is {the} left or right of {other}?
        on which side of {other} is {the}, left or right?
        which side of {other} is {the} on, left or right?""",
        """does {the} stand left or right of {other}?
        seen from {other}, is {the} on the left or on the right?""",
    ),
    "above_below": _table(
        """is {the} above or below {other}?
        is {the} higher or lower than {other}, above or below?
        is {the} over or under {other}, above or below?""",
        """does {the} stand above or below {other}?
        seen from {other}, is {the} above or below?""",
    ),
    "larger": _table(
        """which is larger, {the} or {other}?
        which is bigger, {the} or {other}?
        which one is larger, {the} or {other}?
        what is bigger, {the} or {other}?
        which one looks bigger in the picture, {the} or {other}?""",
        """which of the two is larger: {the} or {other}?
        what takes more room in the picture, {the} or {other}?""",
    ),
    "smaller": _table(
        """which is smaller, {the} or {other}?
        which one is smaller, {the} or {other}?
        what is smaller, {the} or {other}?""",
        """which of the two is smaller: {the} or {other}?
        what takes less room in the picture, {the} or {other}?""",
    ),
    "largest": _table(
        """what is the largest thing in the picture?
        which thing is the largest?
        what is the biggest thing?
        which thing is the biggest?
        what is the biggest object in the image?""",
        """what takes up the most room in the picture?
        which object is the largest one?""",
    ),
    "list": _table(
        """list the things in the picture.
        list the things.
        what things are in the picture?
        which things can you see?
        name everything in the picture.
        what objects are there?
        list all objects.
        what are the things in this picture?
        which objects are in the image?
        name all the things you see.""",
        """make a list of what you see.
        what are all the objects shown here?
        please name every thing in the image.""",
    ),
    "describe": _table(
        """describe the picture.
        describe this image.
        describe what you see.
        what is going on in this picture?
        tell me what you see.
        give a description of the image.
        can you describe the picture?
        what does this image show? Describe it.""",
        """please describe what is shown here.
        how would you describe this picture?
        write a short description of the image.""",
    ),
    "which_kind": _table(
        """which {kind} is in the picture?
        what {kind} is there?
        what {kind} can you see?
        which {kind} do you see?
        what {kind} is in the picture?
        name the {kind} in the picture.""",
        """which {kind} does the image show?
        tell me what {kind} is there.""",
    ),
    "any_kind": _table(
        """is there {one} in the picture?
        is there {one}?
        do you see {one}?
        can you see {one}?
        are there any {many}?
        do you see any {many}?
        is any of the things {one}?""",
        """does the image show any {many}?
        are {many} to be seen here?""",
    ),
    "eat": _table(
        """can you eat it?
        can you eat this?
        can it be eaten?
        is it edible?
        is this something to eat?
        is this food?
        can people eat this?
        do people eat it?""",
        """would you eat this?
        is it something that you can eat?
        is the thing in the picture edible?""",
    ),
    "drink": _table(
        """can you drink it?
        can you drink this?
        is this something to drink?
        is this a drink?
        do people drink it?""",
        """would you drink this?
        is it something that people can drink?""",
    ),
    "fly": _table(
        """can it fly?
        does it fly?
        can this fly?
        does this fly?
        is it able to fly?
        can you see it in the air?
        is this something that flies?""",
        """would it be able to fly?
        is the thing in the picture something that flies?""",
    ),
    "water": _table(
        """does it live in water?
        does it live in the water?
        does this animal live in the water?
        can you find it in the water?
        does this animal swim in the sea, a lake or a river?""",
        """is water where it lives?
        is its home in the water?""",
    ),
    "wheels": _table(
        """does it have wheels?
        does this have wheels?
        has it got wheels?
        is it something with wheels?
        does it run on wheels?""",
        """are there wheels on such a thing?
        would it have wheels?""",
    ),
    "alive": _table(
        """is it alive?
        is it a living thing?
        is this a living thing?
        does it live?
        is this something alive?""",
        """would you call it a living thing?
        is the thing in the picture alive?""",
    ),
    "wear": _table(
        """can you wear it?
        can you wear this?
        is this something to wear?
        do people wear it?
        is it worn?""",
        """would you put it on?
        is it something that people wear?""",
    ),
    "farm": _table(
        """does it live on a farm?
        is this a farm animal?
        can you find this animal on a farm?
        is it a farm animal?""",
        """would you meet it on a farm?
        do farmers keep this animal?""",
    ),
    "in_a_sentence": _table(
        """Answer in a sentence.
        Answer in a full sentence.
        Please answer in a sentence.
        Use a whole sentence.
        Reply with a sentence.""",
        """Give your answer as a sentence.
        Write a complete sentence.""",
    ),
    "color": _table(
        """what color is {the}?
        what colour is {the}?
        what is the color of {the}?
        which color does {the} have?
        which color is {the}?
        tell me the color of {the}.""",
        """of what color is {the}?
        {the} has which color?
        in what color is {the} drawn?""",
    ),
    "ground": _table(
        """what color is the background?
        what colour is the background?
        what is the color of the background?
        which color is behind it?
        what color is the ground behind the things?""",
        """which color does the background have?
        tell me the color of the background.""",
    ),
    "which_shape": _table(
        """what shape is in the image?
        what shape is this?
        what shape does the image contain?
        what shape is present?
        which shape is shown?
        what is the shape in the picture?
        what shape can you see?
        which shape is in the picture?
        what shape is there?
        what shape is in this picture?""",
        """what shape am I looking at?
        which shape does the picture contain?
        name the shape that is shown.""",
    ),
    "lone_color": _table(
        """what color is the shape?
        what is the color of the shape?
        which color is the shape?
        what color does the shape have?
        what colour is the shape in the image?
        what color is the object?
        what color is it?""",
        """which color does the shape have?
        in what color is the shape drawn?""",
    ),
    "shape": _table(
        """what shape is the {noun}?
        what is the shape of the {noun}?
        what is the {noun}?
        which shape does the {noun} have?""",
        """of what shape is the {noun}?
        tell me the shape of the {noun}.""",
    ),
    "exists_shape": _table(
        """is there {one} in the image?
        does the image contain {one}?
        is {one} present?
        is {one} in the image?
        is there {one} present?
        does the image show {one}?
        is {one} present in the image?
        does the picture contain {one}?""",
        """does this picture have {one}?
        is {one} to be found in the image?""",
    ),
    "exists_not": _table(
        """is there not {one} in the image?
        is there no {noun} in the image?
        is there no {noun}?
        does the image not contain {one}?
        is no {noun} present?
        does the image contain no {noun}?
        is {one} not present?
        is {one} missing from the image?
        is no {noun} in the picture?
        is {one} not in the image?""",
        """is {one} absent?
        is it true that there is no {noun}?""",
    ),
    "read": _table(
        """what is written on {the}?
        what does {the} say?
        read {the}.
        what is written?
        what text is on {the}?
        what does it say?
        read the text.
        what is the text in the picture?
        what word or text do you see?
        which words are on {the}?
        what is written here?""",
        """please read what is written.
        what can be read on {the}?
        tell me the text in the image.""",
    ),
    "sign_color": _table(
        """what color is {the}?
        what is the color of {the}?
        what colour is {the}?
        which color does {the} have?
        what color is the plate?
        what is the color of the plate?""",
        """in what color is {the}?
        tell me the color of {the}.""",
    ),
    "text_color": _table(
        """what color is the text on {the}?
        what color are the letters on {the}?
        what is the color of the writing on {the}?
        in which color is {the} written?""",
        """which color do the letters on {the} have?
        tell me the color of the text on {the}.""",
    ),
    "count_on": _table(
        """how many {many} are on {the}?
        how many {many} does {the} have?
        count the {many} on {the}.
        how many {many} can you see on {the}?""",
        """what is the number of {many} on {the}?
        how many {many} are written on {the}?""",
    ),
    "first": _table(
        """what is the first {what} on {the}?
        which {what} comes first on {the}?
        what does {the} start with?
        what is the first {what}?""",
        """with which {what} does {the} begin?
        tell me the first {what} on {the}.""",
    ),
    "last": _table(
        """what is the last {what} on {the}?
        which {what} comes last on {the}?
        what does {the} end with?
        what is the last {what}?""",
        """with which {what} does {the} close?
        tell me the last {what} on {the}.""",
    ),
    "has_digit": _table(
        """is there a digit on {the}?
        does {the} show a digit?
        is any character a digit?
        is there a number on {the}?
        does {the} have a digit on it?""",
        """are there any digits on {the}?
        can a digit be seen on {the}?""",
    ),
    "says": _table(
        """does {the} say "{word}"?
        is the word "{word}" on {the}?
        can you read "{word}" on {the}?
        is "{word}" written on {the}?""",
        """do you see the word "{word}" on {the}?
        does "{word}" stand on {the}?""",
    ),
    "tallest": _table(
        """which bar is the tallest?
        which bar is tallest?
        what color is the tallest bar?
        which bar is the highest?
        what is the color of the tallest bar?
        which color has the highest value?""",
        """which bar stands highest?
        what color has the tallest bar?""",
    ),
    "shortest": _table(
        """which bar is the shortest?
        which bar is shortest?
        what color is the shortest bar?
        which bar is the lowest?
        what is the color of the shortest bar?
        which color has the lowest value?""",
        """which bar stands lowest?
        what color has the shortest bar?""",
    ),
    "tallest_lying": _table(
        """which bar is the longest?
        what color is the longest bar?
        which color has the highest value?""",
        """what color has the longest bar?
        which bar reaches furthest?""",
    ),
    "shortest_lying": _table(
        """which bar is the shortest?
        what color is the shortest bar?
        which color has the lowest value?""",
        """what color has the shortest bar?
        which bar reaches least far?""",
    ),
    "height": _table(
        """how tall is the {c} bar?
        what is the height of the {c} bar?
        how high is the {c} bar?
        what value does the {c} bar show?
        what is the value of the {c} bar?""",
        """how high does the {c} bar reach?
        tell me the value of the {c} bar.""",
    ),
    "height_lying": _table(
        """how long is the {c} bar?
        what is the length of the {c} bar?
        what value does the {c} bar show?
        what is the value of the {c} bar?""",
        """how far does the {c} bar reach?
        tell me the value of the {c} bar.""",
    ),
    "which_height": _table(
        """which bar has the value {n}?
        which bar shows {n}?
        what color is the bar of value {n}?""",
        """which of the bars stands at {n}?
        what color has the bar that shows {n}?""",
    ),
    "taller": _table(
        """is the {a} bar taller than the {b} bar?
        is the {a} bar higher than the {b} one?
        does the {a} bar show more than the {b} bar?""",
        """does the {a} bar rise above the {b} bar?
        is the {a} bar the taller one, compared with the {b} bar?""",
    ),
    "taller_lying": _table(
        """is the {a} bar longer than the {b} bar?
        is the {a} bar longer than the {b} one?
        does the {a} bar show more than the {b} bar?""",
        """is the {a} bar the longer one, compared with the {b} bar?
        does the {a} bar reach further than the {b} bar?""",
    ),
    "list_bars": _table(
        """list the bars.
        which bars are there?
        list the bars and their heights.
        what are the values of the bars?
        list the bars and their values.""",
        """make a list of the bars and what they show.
        please name each bar with its value.""",
    ),
    "slice_largest": _table(
        """which slice is the largest?
        what color is the largest slice?
        which part of the pie is the biggest?
        what color is the biggest slice?""",
        """which color takes up most of the pie?
        what color has the largest part?""",
    ),
    "slice_smallest": _table(
        """which slice is the smallest?
        what color is the smallest slice?
        which part of the pie is the smallest?""",
        """which color takes up least of the pie?
        what color has the smallest part?""",
    ),
    "cell": _table(
        """what is in row {r}, column {c}?
        what color is the cell in row {r}, column {c}?
        what is at row {r} and column {c}?
        which color is in column {c}, row {r}?
        what is in column {c} of row {r}?""",
        """tell me what row {r}, column {c} holds.
        which color does the cell at row {r}, column {c} have?""",
    ),
    "rows": _table(
        """how many {many} does the board have?
        how many {many} are there?
        how many {many} does the grid have?
        count the {many}.
        how many {many} can you see?""",
        """what is the number of {many}?
        of how many {many} is the board made?""",
    ),
    "row": _table(
        """what is in row {r}?
        list the cells of row {r}.
        which colors are in row {r}?
        what colors does row {r} have?
        read row {r} from left to right.""",
        """tell me what row {r} holds.
        what do the cells of row {r} show?""",
    ),
}
