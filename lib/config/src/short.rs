//! Tables that have a short form: the text of their command line option.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, Serializer};

use crate::keyvalue;

/// A table that can be written as a key=value list.
pub trait Short: DeserializeOwned {
    /// The key that a bare first value belongs to.
    const MAIN_KEY: Option<&'static str>;

    /// Reads the short form.
    fn from_text(text: &str) -> Result<Self, keyvalue::Error> {
        keyvalue::from_str(text, Self::MAIN_KEY)
    }
}

/// Something that a VM has or has not: `false`, `true`, or a table that says more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Switch<T> {
    /// The VM has none.
    Off,
    /// The VM has one.
    On(T),
}

impl<T: Short + Default> Switch<T> {
    /// Reads the command line's form: `on`, `off`, nothing (which means on) or a key=value list.
    pub fn from_text(text: &str) -> Result<Self, keyvalue::Error> {
        match text {
            "off" => Ok(Self::Off),
            "" | "on" => Ok(Self::On(T::default())),
            keys => T::from_text(keys).map(Self::On),
        }
    }
}

impl<T: Serialize> Serialize for Switch<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_bool(false),
            Self::On(table) => table.serialize(serializer),
        }
    }
}

impl<'de, T: Short + Default> Deserialize<'de> for Switch<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SwitchVisitor<T>(PhantomData<T>);

        impl<'de, T: Short + Default> Visitor<'de> for SwitchVisitor<T> {
            type Value = Switch<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, a table, or the text of the command line option")
            }

            fn visit_bool<E: serde::de::Error>(self, on: bool) -> Result<Self::Value, E> {
                Ok(if on {
                    Switch::On(T::default())
                } else {
                    Switch::Off
                })
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
                Switch::from_text(text).map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Switch::On)
            }
        }

        deserializer.deserialize_any(SwitchVisitor(PhantomData))
    }
}

/// `deserialize_with` for a table or its short form.
pub(crate) fn table<'de, D: Deserializer<'de>, T: Short>(deserializer: D) -> Result<T, D::Error> {
    struct TableVisitor<T>(PhantomData<T>);

    impl<'de, T: Short> Visitor<'de> for TableVisitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table, or the text of the command line option")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<T, E> {
            T::from_text(text).map_err(E::custom)
        }

        fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }

    deserializer.deserialize_any(TableVisitor(PhantomData))
}

/// `deserialize_with` for an optional table or its short form.
pub(crate) fn optional_table<'de, D: Deserializer<'de>, T: Short>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    table(deserializer).map(Some)
}

/// `deserialize_with` for an array of tables or short forms.
pub(crate) fn tables<'de, D: Deserializer<'de>, T: Short>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    struct Element<T>(T);

    impl<'de, T: Short> Deserialize<'de> for Element<T> {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            table(deserializer).map(Element)
        }
    }

    Vec::<Element<T>>::deserialize(deserializer)
        .map(|elements| elements.into_iter().map(|element| element.0).collect())
}
