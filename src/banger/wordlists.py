"""The words that generated VM names are made of: short, friendly, easy to say and to type."""

ADJECTIVES = tuple(
    """
    able agile amber ample apt avid bold brave breezy bright brisk broad calm candid careful
    cheery civil classic clean clear clever cool cosmic cozy crisp curious daring deep deft dry
    eager early earnest easy elder epic even exact fair famous fancy fast fine firm fleet fond
    free fresh frosty full gentle giant glad gold good grand great green handy happy hardy
    honest humble ideal jolly keen kind large late lean light lively local lofty loud loyal
    lucid lucky lunar major mellow merry mild misty modest neat nimble noble novel open patient
    plain polite prime proud quick quiet rapid rare ready regal rich robust round royal rustic
    sage sharp shiny silent silver simple sleek smart smooth snowy solar solid steady still
    stout sunny super swift tame tidy tiny true upbeat urban valid vast velvet vivid warm wise
    witty young zesty
    """.split()
)

NOUNS = tuple(
    """
    acorn alder anchor aspen atlas badger bamboo basin bay beacon beaver birch bison bloom bluff
    bolt branch breeze brook canyon cedar cliff cloud clover comet condor copper coral crane
    creek crest cricket crow dawn delta dune eagle echo elm ember falcon fern field finch fjord
    flint forest fox galaxy garnet glacier glade grove gull harbor hare hawk hazel heron hill
    ibis inlet iris island ivy jade jasper juniper kestrel lagoon lake lark laurel ledge lily
    linden lion lotus lynx maple marsh meadow mesa meteor moon moss moth nebula oak oasis ocean
    olive opal orbit orchid osprey otter owl palm panda peak pearl pebble pine planet plover
    pond poplar prairie quail quartz rain raven reed reef ridge river robin rock sable sage sail
    sand sequoia shell shore sky sparrow spruce star stone stork stream summit sun swan thistle
    tide tiger trail tulip valley violet walnut wave willow wind wolf wren yarrow zephyr
    """.split()
)
