//! What every adapter of the port does alike.

use std::time::Duration;

use super::{Appended, Batch, Entry, Live, Page};
use crate::Cache;

const SHORT: Duration = Duration::from_millis(400);
const LONG: Duration = Duration::from_secs(60);

fn batch<'a>(holder: &'a str, from: i64, entries: &[(&str, i64)]) -> Batch<'a> {
    let entry = |(stream, place): &(&str, i64)| Entry {
        stream: (*stream).to_owned(),
        place: *place,
        payload: format!("{stream} {place} \0\u{e9}").into_bytes(),
    };
    Batch {
        log: "log",
        holder,
        from,
        to: entries.last().map_or(from, |(_, place)| *place),
        entries: entries.iter().map(entry).collect(),
        keep: 1000,
    }
}

fn entries(stream: &str, places: &[i64]) -> Page {
    let entry = |place: &i64| (*place, format!("{stream} {place} \0\u{e9}").into_bytes());
    Page::Entries(places.iter().map(entry).collect())
}

/// On an empty store.
pub async fn conforms(live: &dyn Live) {
    // What is said is heard by all who listen, in order, and by nobody else.
    live.publish("a", "before").await.unwrap();
    let (mut first, mut second) = (live.listen("a").await.unwrap(), live.listen("a").await.unwrap());
    live.publish("b", "elsewhere").await.unwrap();
    for message in ["one", "two"] {
        live.publish("a", message).await.unwrap();
    }
    for ear in [&mut first, &mut second] {
        assert_eq!(ear.next().await.as_deref(), Some("one"));
        assert_eq!(ear.next().await.as_deref(), Some("two"));
    }

    // A lease has one holder, until it is given up or its term ends.
    let hold = async |holder, term| live.hold("log", holder, term).await.unwrap();
    assert!(hold("x", LONG).await && hold("x", LONG).await && !hold("y", LONG).await);
    live.release("log", "y").await.unwrap();
    assert!(!hold("y", LONG).await);
    live.release("log", "x").await.unwrap();
    assert!(hold("y", SHORT).await);
    tokio::time::sleep(SHORT * 2).await;
    assert!(hold("x", LONG).await);

    // Only the holder appends, and only where the log stands.
    let far = (1_i64 << 53) + 1; // beyond what a double tells apart
    let append = async |batch: Batch<'_>| live.append(&batch).await.unwrap();
    assert_eq!(append(batch("x", far, &[("s", far + 1)])).await, Appended::At(None));
    assert_eq!(live.begin("log", far).await.unwrap(), far);
    assert_eq!(live.begin("log", 7).await.unwrap(), far);
    assert_eq!(append(batch("y", far, &[("s", far + 1)])).await, Appended::NotHeld);
    assert_eq!(
        append(batch("x", far - 1, &[("s", far)])).await,
        Appended::At(Some(far))
    );
    let pieces = [("s", far + 1), ("t", far + 2), ("s", far + 5)];
    assert_eq!(append(batch("x", far, &pieces)).await, Appended::Done);
    assert_eq!(append(batch("x", far, &pieces)).await, Appended::At(Some(far + 5)));

    // Each stream is read from where its reader is.
    let read = async |stream, after, limit| live.read("log", stream, after, limit).await.unwrap();
    assert_eq!(read("s", far, 10).await, entries("s", &[far + 1, far + 5]));
    assert_eq!(read("s", far, 1).await, entries("s", &[far + 1]));
    assert_eq!(read("s", far + 1, 10).await, entries("s", &[far + 5]));
    assert_eq!(read("t", far, 10).await, entries("t", &[far + 2]));
    assert_eq!(read("u", far, 10).await, entries("u", &[]));
    // Of what came before the log began, nothing is known.
    assert_eq!(read("s", far - 1, 10).await, Page::Gap);
    assert_eq!(read("u", far - 1, 10).await, Page::Gap);
    assert_eq!(live.read("other", "s", far, 10).await.unwrap(), Page::Gap);
    let since = async |stream| live.since("log", stream).await.unwrap();
    assert_eq!((since("s").await, since("u").await), (Some(far), Some(far)));
    assert_eq!(live.since("other", "s").await.unwrap(), None);
    assert_eq!(live.stands("log").await.unwrap(), Some(far + 5));
    assert_eq!(live.stands("other").await.unwrap(), None);

    // What was dropped to make room is known to be missing.
    let many: Vec<(&str, i64)> = (0..1000).map(|number| ("s", far + 10 + number)).collect();
    let mut piece = batch("x", far + 5, &many);
    piece.keep = 100;
    assert_eq!(append(piece).await, Appended::Done);
    assert_eq!(read("s", far + 1, 10).await, Page::Gap);
    assert_eq!(read("s", far + 1000, 2).await, entries("s", &[far + 1001, far + 1002]));
    let first = since("s").await.unwrap();
    assert!(first > far + 5);
    assert_eq!(read("s", first, 1).await, entries("s", &[first + 1]));

    // A log that is forgotten begins anew, and nobody reads what it had.
    live.forget("log").await.unwrap();
    assert_eq!((live.stands("log").await.unwrap(), since("s").await), (None, None));
    assert_eq!(
        append(batch("x", far + 1009, &[("s", far + 1010)])).await,
        Appended::At(None)
    );
    assert_eq!(live.begin("log", far + 1020).await.unwrap(), far + 1020);
    assert_eq!(
        append(batch("x", far + 1020, &[("s", far + 1021)])).await,
        Appended::Done
    );
    assert_eq!(read("s", far + 1000, 2).await, Page::Gap);
    assert_eq!(since("s").await, Some(far + 1020));
    assert_eq!(read("s", far + 1020, 10).await, entries("s", &[far + 1021]));
    // Of a store of another cluster, whose places begin below.
    live.forget("log").await.unwrap();
    assert_eq!(live.begin("log", 10).await.unwrap(), 10);
    assert_eq!(append(batch("x", 10, &[("s", 11)])).await, Appended::Done);
    assert_eq!(read("s", 10, 10).await, entries("s", &[11]));
    // Whoever stands there reads nothing that was undone.
    assert_eq!(read("t", 10, 10).await, entries("t", &[]));
}

/// What every adapter of a cache does alike.
pub async fn caches(cache: &dyn Cache) {
    let get = async |keys: &[&str]| {
        let keys: Vec<_> = keys.iter().map(|&key| key.to_owned()).collect();
        cache.get(&keys).await.unwrap()
    };
    let value = |key: &str, value: &[u8]| (key.to_owned(), value.to_vec());
    assert_eq!(get(&[]).await, []);
    assert_eq!(get(&["nothing", "nowhere"]).await, [None, None]);
    let bytes: Vec<u8> = (0..=255).collect();
    // A master whose replicas lag takes nothing for a moment.
    let mut left = 100;
    while let Err(error) = cache.put(&[value("a", &bytes), value("b", b"")], LONG).await {
        left -= 1;
        assert!(left > 0, "{error}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(get(&["b", "nothing", "a"]).await, [Some(Vec::new()), None, Some(bytes)]);
    cache.put(&[value("a", b"new")], SHORT).await.unwrap();
    assert_eq!(get(&["a"]).await, [Some(b"new".to_vec())]);
    tokio::time::sleep(SHORT * 2).await;
    assert_eq!(get(&["a"]).await, [None]);
}
